//! What [`unsloth_core::ops::linear`] has to show on a device.

use unsloth_core::{DType, Device, Tensor, Weight, ops::linear};

use crate::{
    arith::{Exact, Rounded, round},
    budget::{Expected, Floor, check_tensor},
    data::{self, Data},
    expect::{self, Rejects},
    oracle::linear::{self as oracle, Dims},
    report::{self, Case, Checked},
};

const OP: &str = "linear";

/// `(rows, in_features, out_features)`: none, one, primes, one off a power of two, odd tails, and each dimension longer
/// than a block that a device may work in.
const SHAPES: [(usize, usize, usize); 15] = [
    (0, 5, 7),
    (3, 5, 0),
    (3, 0, 5),
    (6, 0, 5),
    (1, 1, 1),
    (5, 1, 3),
    (3, 7, 1),
    (2, 63, 65),
    (64, 64, 64),
    (65, 130, 63),
    (7, 97, 31),
    (13, 1031, 11),
    (1031, 3, 7),
    (3, 5, 4099),
    (3, 4099, 5),
];

/// Runs the suite.
///
/// # Panics
/// If the device fails it.
pub fn run(device: &Device) {
    report::finish(OP, device, check(device));
}

/// The suite.
///
/// # Errors
/// The first failure.
pub fn check(device: &Device) -> Checked {
    for (dtype, weight_dtype) in dtype_pairs(device) {
        for shape in SHAPES {
            on_shape(device, shape, (dtype, weight_dtype))?;
        }
    }
    for dtype in device.float_dtypes() {
        let case = Case::new(device, OP, format!("sums_in_f32, {dtype}"));
        sums_in_f32(device, &case, dtype).map_err(|failure| failure.within(&case))?;
    }
    let case = Case::new(device, OP, "rejects");
    rejects(device, &case).map_err(|failure| failure.within(&case))
}

/// As [`SHAPES`], with sizes that tensor cores take: in units of eight, also where many make several blocks.
const SHAPES_OF_CHUNKS: [(usize, usize, usize); 7] =
    [(64, 64, 64), (8, 8, 8), (200, 136, 264), (5, 40, 72), (144, 1032, 16), (9, 16, 4099), (1031, 24, 8)];

/// Sums of so many terms that tensor cores, which cut off what does not fit, put them into f32 now and then: forward, the input's gradient.
const LONG_SUMS: [(usize, usize, usize); 2] = [(9, 8232, 16), (5, 24, 8232)];

/// Products of so many rows and columns that a large device is full with large blocks: forward, the input's gradient, the weight's.
const LARGE_SHAPES: [(usize, usize, usize); 3] = [(1031, 24, 1664), (1031, 1664, 24), (24, 1664, 1032)];

/// Runs the part of the suite that tensor cores may run.
///
/// # Panics
/// If the device fails it.
pub fn run_on_tensor_cores(device: &Device) {
    report::finish(OP, device, check_on_tensor_cores(device));
}

/// The part of the suite that tensor cores may run: half-precision types, in sizes of whole chunks.
///
/// # Errors
/// The first failure.
pub fn check_on_tensor_cores(device: &Device) -> Checked {
    for (dtype, weight_dtype) in [(DType::BF16, DType::F32), (DType::F32, DType::BF16)] {
        for shape in SHAPES_OF_CHUNKS.into_iter().chain(LONG_SUMS) {
            on_shape(device, shape, (dtype, weight_dtype))?;
        }
    }
    for shape in LARGE_SHAPES {
        on_shape(device, shape, (DType::BF16, DType::BF16))?;
    }
    for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
        for shape in SHAPES_OF_CHUNKS {
            on_shape(device, shape, (dtype, dtype))?;
        }
        let case = Case::new(device, OP, format!("sums_in_f32, {dtype}"));
        sums_in_f32(device, &case, dtype).map_err(|failure| failure.within(&case))?;
    }
    Ok(())
}

fn on_shape(
    device: &Device,
    (rows, in_features, out_features): (usize, usize, usize),
    (dtype, weight_dtype): (DType, DType),
) -> Checked {
    let dims = Dims { rows, in_features, out_features };
    let detail = format!("{rows} rows, {in_features} -> {out_features}, {dtype}, weight {weight_dtype}");
    let case = Case::new(device, OP, detail);
    products(device, &case, dims, (dtype, weight_dtype)).map_err(|failure| failure.within(&case))
}

/// Every storage type of activations with every storage type of weights.
pub(super) fn dtype_pairs(device: &Device) -> Vec<(DType, DType)> {
    let all = device.float_dtypes();
    all.iter().flat_map(|&dtype| all.iter().map(move |&weight_dtype| (dtype, weight_dtype))).collect()
}

/// A matrix of a linear layer.
pub(super) fn weight(device: &Device, values: &[f64], shape: [usize; 2], dtype: DType) -> unsloth_core::Result<Weight> {
    device.prepare_weight(data::tensor(device, values, shape, dtype)?)
}

/// Values without their signs. A reference made of sums of products gives, for such inputs, the sums of the magnitudes of
/// its terms.
pub(super) fn magnitudes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value.abs()).collect()
}

/// The largest magnitude, 0 for none.
pub(super) fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, value| value.abs().max(most))
}

/// Holds a result made of sums of products to its budget. `reference` gives the exact result, the naive one, and the one of
/// inputs without signs.
pub(super) fn check_sums(
    case: &Case,
    (name, tensor): (&str, &Tensor),
    (shape, dtype): (&[usize], DType),
    [exact, naive, of_magnitudes]: [Vec<f64>; 3],
) -> Checked {
    expect::form(case, name, tensor, (shape, dtype))?;
    let floor = Floor::Cancelling { dtype, magnitude: largest(&of_magnitudes) };
    check_tensor(case, name, tensor, Expected { exact: &exact, naive: &naive, floor })
}

/// All four products: budget, accumulation on top of what was there, repeatability.
fn products(device: &Device, case: &Case, dims: Dims, (dtype, weight_dtype): (DType, DType)) -> Checked {
    let Dims { rows, in_features, out_features } = dims;
    // A bias may have yet another type than the matrix.
    let bias_dtype = if weight_dtype == dtype { DType::F32 } else { dtype };
    let naive = Rounded(dtype);
    let mut data = Data::new(21);
    let (x, dy) = (data.normal(rows * in_features, 1.0, dtype), data.normal(rows * out_features, 0.5, dtype));
    let w = data.normal(out_features * in_features, 0.3, weight_dtype);
    let bias = data.normal(out_features, 2.0, bias_dtype);
    let [abs_x, abs_dy, abs_w, abs_bias] = [&x, &dy, &w, &bias].map(|values| magnitudes(values));
    let x_tensor = data::tensor(device, &x, [rows, in_features], dtype)?;
    let dy_tensor = data::tensor(device, &dy, [rows, out_features], dtype)?;
    let weight = weight(device, &w, [out_features, in_features], weight_dtype)?;
    let bias_tensor = data::tensor(device, &bias, [out_features], bias_dtype)?;

    for (bias, abs_bias, tensor) in [(None, None, None), (Some(&*bias), Some(&*abs_bias), Some(&bias_tensor))] {
        let y = linear::forward(&x_tensor, &weight, tensor)?;
        let reference = [
            oracle::forward(&Exact, dims, &x, &w, bias),
            oracle::forward(&naive, dims, &x, &w, bias),
            oracle::forward(&Exact, dims, &abs_x, &abs_w, abs_bias),
        ];
        check_sums(case, ("y", &y), (&[rows, out_features], dtype), reference)?;
        expect::same_bits(case, "y", &y, &linear::forward(&x_tensor, &weight, tensor)?)?;
    }
    let dx = linear::input_gradient(&dy_tensor, &weight)?;
    let reference = [
        oracle::input_gradient(&Exact, dims, &dy, &w),
        oracle::input_gradient(&naive, dims, &dy, &w),
        oracle::input_gradient(&Exact, dims, &abs_dy, &abs_w),
    ];
    check_sums(case, ("dx", &dx), (&[rows, in_features], dtype), reference)?;
    expect::same_bits(case, "dx", &dx, &linear::input_gradient(&dy_tensor, &weight)?)?;
    parameter_gradients(device, case, (dims, dtype), (&x, &dy), (&x_tensor, &dy_tensor))
}

/// `dweight` and `dbias` are added to what the buffers hold.
fn parameter_gradients(
    device: &Device,
    case: &Case,
    (dims, dtype): (Dims, DType),
    (x, dy): (&[f64], &[f64]),
    (x_tensor, dy_tensor): (&Tensor, &Tensor),
) -> Checked {
    let Dims { in_features, out_features, .. } = dims;
    let naive = Rounded(dtype);
    let (abs_x, abs_dy) = (magnitudes(x), magnitudes(dy));
    let before = Data::new(22).normal(out_features * in_features, 3.0, DType::F32);
    let abs_before = magnitudes(&before);
    let dweight = || -> Checked<Tensor> {
        let mut dweight = data::tensor(device, &before, [out_features, in_features], DType::F32)?;
        linear::weight_gradient(dy_tensor, x_tensor, &mut dweight)?;
        Ok(dweight)
    };
    let reference = [
        oracle::weight_gradient(&Exact, dims, dy, x, &before),
        oracle::weight_gradient(&naive, dims, dy, x, &before),
        oracle::weight_gradient(&Exact, dims, &abs_dy, &abs_x, &abs_before),
    ];
    let first = dweight()?;
    check_sums(case, ("dweight", &first), (&[out_features, in_features], DType::F32), reference)?;
    expect::same_bits(case, "dweight", &first, &dweight()?)?;

    let before = Data::new(23).normal(out_features, 3.0, DType::F32);
    let abs_before = magnitudes(&before);
    let dbias = || -> Checked<Tensor> {
        let mut dbias = data::tensor(device, &before, [out_features], DType::F32)?;
        linear::bias_gradient(dy_tensor, &mut dbias)?;
        Ok(dbias)
    };
    let reference = [
        oracle::bias_gradient(&Exact, dims, dy, &before),
        oracle::bias_gradient(&naive, dims, dy, &before),
        oracle::bias_gradient(&Exact, dims, &abs_dy, &abs_before),
    ];
    let first = dbias()?;
    check_sums(case, ("dbias", &first), (&[out_features], DType::F32), reference)?;
    expect::same_bits(case, "dbias", &first, &dbias()?)
}

/// Sums that another accumulator than f32 would lose: 1031 ones, where bf16 stops counting at 256, and terms of 40000, two of
/// which are beyond f16, that cancel to one of them.
fn sums_in_f32(device: &Device, case: &Case, dtype: DType) -> Checked {
    let count = 1031;
    let ones = vec![1.0; count];
    let row = data::tensor(device, &ones, [1, count], dtype)?;
    let matrix = weight(device, &ones, [1, count], dtype)?;
    let counted = [round(dtype, count as f64)];
    let expected = Expected { exact: &counted, naive: &counted, floor: Floor::Exact };
    check_tensor(case, "y of ones", &linear::forward(&row, &matrix, None)?, expected)?;
    let column = data::tensor(device, &ones, [count, 1], dtype)?;
    let expected = Expected { exact: &[count as f64], naive: &[count as f64], floor: Floor::Exact };
    let mut dweight = data::tensor(device, &[0.0], [1, 1], DType::F32)?;
    linear::weight_gradient(&column, &column, &mut dweight)?;
    check_tensor(case, "dweight of ones", &dweight, expected)?;
    let mut dbias = data::tensor(device, &[0.0], [1], DType::F32)?;
    linear::bias_gradient(&column, &mut dbias)?;
    check_tensor(case, "dbias of ones", &dbias, expected)?;

    let signs: Vec<f64> = (0..count).map(|i| if i <= count / 2 { 200.0 } else { -200.0 }).collect();
    let row = data::tensor(device, &vec![200.0; count], [1, count], dtype)?;
    let y = linear::forward(&row, &weight(device, &signs, [1, count], dtype)?, None)?;
    let left = [round(dtype, 40_000.0)];
    check_tensor(case, "y of large terms", &y, Expected { exact: &left, naive: &left, floor: Floor::Exact })
}

fn rejects(device: &Device, case: &Case) -> Checked {
    let f32 = |shape: [usize; 2]| data::tensor(device, &vec![1.0; shape[0] * shape[1]], shape, DType::F32);
    let vector = |length: usize| data::tensor(device, &vec![1.0; length], [length], DType::F32);
    let (x, dy, matrix) = (f32([2, 3])?, f32([2, 4])?, device.prepare_weight(f32([4, 3])?)?);
    let integers = data::integers(device, &[1, 2, 3])?;

    expect::rejects(case, Rejects::Shape("dense"), device.prepare_weight(vector(3)?))?;
    expect::rejects(case, Rejects::Shape("x"), linear::forward(&f32([2, 4])?, &matrix, None))?;
    expect::rejects(case, Rejects::Shape("x"), linear::forward(&vector(3)?, &matrix, None))?;
    expect::rejects(case, Rejects::DType("x"), linear::forward(&integers, &matrix, None))?;
    expect::rejects(case, Rejects::Shape("bias"), linear::forward(&x, &matrix, Some(&vector(3)?)))?;
    expect::rejects(case, Rejects::DType("bias"), linear::forward(&x, &matrix, Some(&integers)))?;
    expect::rejects(case, Rejects::Shape("dy"), linear::input_gradient(&x, &matrix))?;
    expect::rejects(case, Rejects::DType("dy"), linear::input_gradient(&integers, &matrix))?;

    let gradient = |dy: &Tensor, x: &Tensor, mut dweight: Tensor| linear::weight_gradient(dy, x, &mut dweight);
    expect::rejects(case, Rejects::Shape("x"), gradient(&dy, &f32([3, 3])?, f32([4, 3])?))?;
    expect::rejects(case, Rejects::Shape("dweight"), gradient(&dy, &x, f32([3, 4])?))?;
    let shared = f32([4, 3])?;
    expect::rejects(case, Rejects::Shared("dweight"), gradient(&dy, &x, shared.clone()))?;
    expect::rejects(case, Rejects::Shape("dbias"), linear::bias_gradient(&dy, &mut vector(3)?))?;
    let shared = vector(4)?;
    expect::rejects(case, Rejects::Shared("dbias"), linear::bias_gradient(&dy, &mut shared.clone()))?;
    for dtype in device.float_dtypes().into_iter().filter(|&dtype| dtype != DType::F32) {
        let half = |shape: [usize; 2]| data::tensor(device, &vec![1.0; shape[0] * shape[1]], shape, dtype);
        expect::rejects(case, Rejects::DType("x"), gradient(&dy, &half([2, 3])?, f32([4, 3])?))?;
        expect::rejects(case, Rejects::DType("dweight"), gradient(&dy, &x, half([4, 3])?))?;
    }
    Ok(())
}
