//! Every operator of the exact device against its suite: what is read of it is f32, so the budgets are those of f32.

use unsloth_testkit::suite;

macro_rules! suites {
    ($($op:ident)*) => {$(
        #[test]
        fn $op() {
            suite::$op::run(&unsloth_exact::device());
        }
    )*};
}

suites! {
    cross_entropy
    dora
    elementwise
    embedding
    glu
    layer_norm
    linear
    linear_cross_entropy
    lora_linear
    reduce
    rms_norm
    rope
    rope_table
}

/// What is between two operators is not rounded to f32.
#[test]
fn values_are_kept_in_f64() {
    use unsloth_core::{Category, ops::elementwise};
    let device = unsloth_exact::device();
    let third = device.from_slice(&[1.0f32], [1], Category::Activations).unwrap();
    let third = elementwise::scale(third, 1.0 / 3.0).unwrap();
    let ninth = elementwise::mul(third.clone(), &third).unwrap();
    let f32_third = f64::from(1.0f32 / 3.0);
    assert_eq!(unsloth_exact::values(&ninth).unwrap(), [f32_third * f32_third]);
    assert_eq!(ninth.to_vec::<f32>().unwrap(), [(f32_third * f32_third) as f32]);
    let mut moved = ninth;
    unsloth_exact::set_values(&mut moved, &[1.0 + 1e-12]).unwrap();
    assert_eq!(unsloth_exact::values(&moved).unwrap(), [1.0 + 1e-12]);
}
