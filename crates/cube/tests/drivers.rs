//! Results that a driver has got wrong.
#![cfg(feature = "wgpu")]

use unsloth_core::{
    DType, Sequences,
    ops::attention::{self, Options},
};
use unsloth_cube::{CubeOptions, adapters, vulkan};
use unsloth_testkit::{
    arith::{Exact, Rounded},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    oracle::attention::{self as oracle, Inputs, Problem},
    report::{Case, Checked},
};

const TOKENS: usize = 512;
const HEADS: usize = 8;

/// Mesa 22.3.6 made a kernel for these sizes, which loaded channels one by one, wrong by 7.8e-3 in every run; with Mesa 25.0.7 it
/// was right.
#[test]
fn attention_of_eight_heads_and_512_tokens() {
    // Loaded as vectors, and one by one.
    for head_dim in [64, 63] {
        attention_is_right(head_dim).unwrap();
    }
}

fn attention_is_right(head_dim: usize) -> Checked {
    let adapter = &adapters()[0];
    println!("running on {} ({})", adapter.name, adapter.driver);
    let device = vulkan(0, CubeOptions { fill_arbitrary_with_nan: true, ..Default::default() })?;
    let case = Case::new(&device, "attention", format!("{HEADS} heads of {head_dim}, {TOKENS} tokens"));

    let options = Options::causal(head_dim);
    let (num_heads, num_kv_heads, lens) = (HEADS, HEADS, vec![TOKENS]);
    let problem = Problem { num_heads, num_kv_heads, head_dim, options, lens_q: lens.clone(), lens_k: lens };
    let mut data = Data::new(22);
    let [q, k, v] = [(); 3].map(|()| data.normal(TOKENS * HEADS * head_dim, 1.0, DType::F32));
    let x = Inputs { q: &q, k: &k, v: &v };
    let (exact, naive) = (oracle::forward(&Exact, &problem, x), oracle::forward(&Rounded(DType::F32), &problem, x));

    let tensor = |values| data::tensor(&device, values, [TOKENS, HEADS, head_dim], DType::F32);
    let (q, k, v, seqs) = (tensor(&q)?, tensor(&k)?, tensor(&v)?, Sequences::from_lengths(&device, &[TOKENS])?);
    let results = attention::forward(attention::Inputs { q: &q, k: &k, v: &v, seq_q: &seqs, seq_k: &seqs }, options)?;
    // The largest value and the largest score of normal inputs, as in the suite.
    let floor = Floor::Cancelling { dtype: DType::F32, magnitude: 5.0 };
    check_tensor(&case, "out", &results.out, Expected { exact: &exact.out, naive: &naive.out, floor })?;
    check_tensor(&case, "lse", &results.lse, Expected { exact: &exact.lse, naive: &naive.lse, floor })
}
