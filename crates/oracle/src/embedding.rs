//! Reference of [`unsloth_core::ops::embedding`].

use crate::arith::Arith;

/// `out[t] = weight[ids[t]]`
pub fn forward<A: Arith>(arith: &A, weight: &[f64], ids: &[i32], hidden_size: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for &id in ids {
        for i in 0..hidden_size {
            out.push(arith.store(weight[id as usize * hidden_size + i]));
        }
    }
    out
}

/// `dweight[ids[t]] += dout[t]`, added to what `dweight` holds already.
pub fn backward<A: Arith>(arith: &A, dweight: &[f64], ids: &[i32], dout: &[f64], hidden_size: usize) -> Vec<f64> {
    let mut sums = dweight.to_vec();
    for (t, &id) in ids.iter().enumerate() {
        for i in 0..hidden_size {
            let at = id as usize * hidden_size + i;
            sums[at] = arith.stat(sums[at] + dout[t * hidden_size + i]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use unsloth_core::DType;

    use super::*;
    use unsloth_testkit::{
        data::Data,
        gradcheck::{self, dot},
    };

    use crate::arith::Exact;

    #[test]
    fn gradient() {
        let (vocab_size, hidden_size, ids) = (5, 3, [4, 0, 4, 2, 4]);
        let mut data = Data::new(1);
        let weight = data.normal(vocab_size * hidden_size, 1.0, DType::F32);
        let dout = data.normal(ids.len() * hidden_size, 1.0, DType::F32);
        let loss = |weight: &[f64]| dot(&forward(&Exact, weight, &ids, hidden_size), &dout);
        let dweight = backward(&Exact, &vec![0.0; weight.len()], &ids, &dout, hidden_size);
        gradcheck::check("dweight", &weight, loss, &dweight).unwrap();
    }
}
