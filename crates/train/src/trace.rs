//! Where the first infinity or NaN of a step comes from.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use unsloth_autograd::{Matrix, Parameter, Vector};
use unsloth_core::{
    BufferId, Device, Result, Tensor,
    observe::{Call, Observer, observed},
};

/// The first call of an operator in a step that gave an infinity or a NaN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The step, from 1.
    pub step: usize,
    /// Operator and part, as in `rms_norm backward`.
    pub op: &'static str,
    /// Its sizes, for people.
    pub shape: String,
    /// Where it stands.
    pub place: Place,
}

/// Where in a model a call stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It reads this weight.
    At(String),
    /// It reads this weight, which was not finite before the call.
    Spoilt(String),
    /// It reads none; the weight was read last before it.
    Behind(String),
    /// No weight has been read yet.
    Beginning,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, op, shape, place } = self;
        write!(f, "the first infinity or NaN of step {step} was made by {op} ({shape})")?;
        match place {
            Place::At(weight) => write!(f, " at `{weight}`"),
            Place::Spoilt(weight) => write!(f, " at `{weight}`, which holds one itself"),
            Place::Behind(weight) => write!(f, ", behind `{weight}`"),
            Place::Beginning => write!(f, ", before any weight was read"),
        }
    }
}

/// A weight, to be recognised when an operator reads it.
#[derive(Clone, Debug)]
pub enum Named {
    /// Of a linear layer or an embedding.
    Matrix(Matrix),
    /// Of a norm, or a bias.
    Vector(Vector),
    /// Of anything else.
    Parameter(Parameter),
}

impl Named {
    fn has(&self, buffer: BufferId) -> bool {
        match self {
            Named::Matrix(matrix) => matrix.has(buffer),
            Named::Vector(vector) => vector.has(buffer),
            Named::Parameter(parameter) => parameter.has(buffer),
        }
    }
}

/// Looks at everything that operators give within a step, until something is infinite or NaN. It waits for the device behind every
/// call, and changes no bit.
#[derive(Debug, Default)]
pub struct NanTrace {
    is_on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    weights: Vec<(String, Named)>,
    step: usize,
    /// The weight that was read last.
    last: Option<BufferId>,
    /// Of the steps that nobody has asked about.
    origins: Vec<Origin>,
}

impl NanTrace {
    /// A trace, and `device` with everything on it looked at.
    pub fn of(device: &Device) -> (Arc<Self>, Device) {
        let trace = Arc::new(Self::default());
        (trace.clone(), observed(device, trace))
    }

    /// Tells what weights are called: by their names, places in the model are told.
    pub fn name_weights(&self, weights: Vec<(String, Named)>) {
        self.state().weights = weights;
    }

    /// Where the first infinity or NaN of a step came from, if there was one; told once.
    pub fn take_origin(&self, step: usize) -> Option<Origin> {
        let mut state = self.state();
        let found = state.origins.iter().position(|origin| origin.step == step)?;
        Some(state.origins.remove(found))
    }

    /// Looks on, at a step.
    pub(crate) fn begin(&self, step: usize) {
        let mut state = self.state();
        (state.step, state.last) = (step, None);
        drop(state);
        self.is_on.store(true, Ordering::Relaxed);
    }

    /// Looks away.
    pub(crate) fn end(&self) {
        self.is_on.store(false, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is kept is whole between any two lines that change it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for NanTrace {
    fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    fn before(&self, _device: &Device) -> Result<()> {
        Ok(())
    }

    fn after(&self, device: &Device, call: &Call<'_>, results: &[&Tensor]) -> Result<()> {
        let is_finite = are_finite(device, results)?;
        // Weights are not written by what reads them, so they are now what they were before the call.
        let spoilt = match is_finite {
            true => None,
            false => call
                .weights
                .iter()
                .map(|weight| Ok((weight, are_finite(device, &[weight])?)))
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .find_map(|(weight, is_finite)| (!is_finite).then(|| weight.buffer_id())),
        };
        let mut state = self.state();
        let name = |state: &State, buffer| {
            let named = state.weights.iter().find(|(_, weight)| weight.has(buffer));
            named.map(|(name, _)| name.clone())
        };
        if is_finite {
            // All weights of a layer are behind the same place.
            let mut read = call.weights.iter().map(|weight| weight.buffer_id());
            state.last = read.find(|&buffer| name(&state, buffer).is_some()).or(state.last);
            return Ok(());
        }
        let own = call.weights.iter().find_map(|weight| name(&state, weight.buffer_id()));
        let place = match (spoilt.and_then(|buffer| name(&state, buffer)), own) {
            (Some(weight), _) => Place::Spoilt(weight),
            (None, Some(weight)) => Place::At(weight),
            (None, None) => state.last.and_then(|buffer| name(&state, buffer)).map_or(Place::Beginning, Place::Behind),
        };
        let origin = Origin { step: state.step, op: call.name, shape: call.shape.clone(), place };
        state.origins.push(origin);
        // What follows from it is of no interest.
        self.end();
        Ok(())
    }
}

fn are_finite(device: &Device, tensors: &[&Tensor]) -> Result<bool> {
    let floats: Vec<&Tensor> =
        tensors.iter().copied().filter(|tensor| tensor.dtype().is_float() && tensor.num_elements() > 0).collect();
    if floats.is_empty() {
        return Ok(true);
    }
    Ok(device.backend().all_finite(&floats)?.to_vec::<f32>()?[0] == 1.0)
}

#[cfg(test)]
mod tests {
    use unsloth_core::{
        Category, Weight,
        ops::{elementwise, glu, linear, rms_norm},
    };

    use super::*;

    fn float(device: &Device, values: &[f32], shape: [usize; 2]) -> Tensor {
        device.from_slice(values, shape, Category::Weights).unwrap()
    }

    /// A trace that looks at step 5, with a matrix of one output.
    fn looking(matrix: [f32; 2]) -> (Arc<NanTrace>, Device, Weight) {
        let (trace, device) = NanTrace::of(&unsloth_cpu::device());
        let weight = device.prepare_weight(float(&device, &matrix, [1, 2])).unwrap();
        trace.name_weights(vec![("up.weight".to_owned(), Named::Matrix(Matrix::Frozen(weight.clone())))]);
        trace.begin(5);
        (trace, device, weight)
    }

    fn place(trace: &NanTrace) -> (&'static str, Place) {
        assert_eq!(trace.take_origin(4), None);
        let Origin { step: 5, op, place, .. } = trace.take_origin(5).unwrap() else { panic!("another step") };
        assert_eq!(trace.take_origin(5), None, "told twice");
        (op, place)
    }

    #[test]
    fn an_operator_with_a_weight_stands_at_it() {
        let (trace, device, weight) = looking([2e38, 2e38]);
        linear::forward(&float(&device, &[1.0, -1.0], [1, 2]), &weight, None).unwrap();
        let y = linear::forward(&float(&device, &[1.0, 1.0], [1, 2]), &weight, None).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [f32::INFINITY]);
        // What follows from it is not told.
        elementwise::scale(y, 2.0).unwrap();
        assert_eq!(place(&trace), ("linear forward", Place::At("up.weight".to_owned())));
    }

    #[test]
    fn a_weight_that_is_not_finite_is_named() {
        let (trace, device, weight) = looking([f32::NAN, 1.0]);
        linear::forward(&float(&device, &[1.0, 1.0], [1, 2]), &weight, None).unwrap();
        let origin = trace.take_origin(5).unwrap();
        let told = "the first infinity or NaN of step 5 was made by linear forward (1 x 2 -> 1) at `up.weight`, which holds one itself";
        assert_eq!(origin.to_string(), told);
    }

    #[test]
    fn an_operator_without_a_weight_stands_behind_the_last() {
        let (trace, device, weight) = looking([1.0, 1.0]);
        let huge = float(&device, &[3e38], [1, 1]);
        elementwise::add(huge.clone(), &huge).unwrap();
        assert_eq!(place(&trace), ("add", Place::Beginning));
        trace.begin(5);
        linear::forward(&float(&device, &[1.0, 1.0], [1, 2]), &weight, None).unwrap();
        // The product of `up` and the derivative of the activation at 100, which is 1, with the gradient.
        glu::backward(&huge, float(&device, &[100.0], [1, 1]), huge.clone(), glu::Activation::Silu).unwrap();
        assert_eq!(place(&trace), ("glu backward", Place::Behind("up.weight".to_owned())));
    }

    #[test]
    fn gradients_that_are_added_to_are_looked_at() {
        let (trace, device, _) = looking([1.0, 1.0]);
        let (dy, x) = (float(&device, &[1e30], [1, 1]), float(&device, &[1e30, 0.0], [1, 2]));
        linear::weight_gradient(&dy, &x, &mut float(&device, &[0.0, 0.0], [1, 2])).unwrap();
        assert_eq!(place(&trace).0, "linear weight gradient");
    }

    #[test]
    fn the_backward_pass_of_a_norm() {
        let (trace, device, _) = looking([1.0, 1.0]);
        let weight = device.from_slice(&[1e20f32, 1e20], [2], Category::Weights).unwrap();
        trace.name_weights(vec![("norm.weight".to_owned(), Named::Vector(Vector::Frozen(weight.clone())))]);
        let x = float(&device, &[1.0, 2.0], [1, 2]);
        let forward = rms_norm::forward(x.clone(), None, &weight, 1e-6, 0.0).unwrap();
        let dout = float(&device, &[1e20, -1e20], [1, 2]);
        let inputs = rms_norm::Backward { dout, dsum: None, sum: &x, weight: &weight, rstd: &forward.rstd };
        rms_norm::backward(inputs, None, 1e-6, 0.0).unwrap();
        assert_eq!(place(&trace), ("rms_norm backward", Place::At("norm.weight".to_owned())));
    }

    #[test]
    fn nothing_is_looked_at_outside_a_step() {
        let (trace, device, weight) = looking([f32::NAN, 1.0]);
        trace.end();
        linear::forward(&float(&device, &[1.0, 1.0], [1, 2]), &weight, None).unwrap();
        assert_eq!(trace.take_origin(5), None);
    }
}
