//! Recomputation instead of storage.                        Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174
//!
//! The gradients have the same bits as without: the function's second run puts its nodes where they would have stood, they
//! add to the same parameter gradients in the same order, and sums of activation gradients are handed through, not formed
//! apart and added.

use unsloth_core::{Error, Result, StoredTensor, Tensor, TensorStore};

use crate::{Deferred, Tape, Var, backward::Context, var::Source};

/// Runs `f` keeping only `inputs`, and runs it again in the backward pass; outputs that are [`Deferred`] are not computed then.
///
/// `f` must compute the same each time, and must use the tape it is given. A value on another tape that it has captured is an
/// error: pass it in `inputs`. Parameters may be captured.
///
/// # Errors
/// Those of `f`; [`Error::InvalidSpec`] for an input of another tape; [`Error::Unsupported`] if `f` makes variables.
pub fn checkpoint<V: Into<Deferred>>(
    tape: &Tape,
    inputs: &[&Var],
    f: impl Fn(&Tape, &[Var]) -> Result<Vec<V>> + 'static,
) -> Result<Vec<Var>> {
    checkpoint_in(None, tape, inputs, f)
}

/// The same with the inputs in a store until the backward pass, if there is one. The bits stay the same.
///
/// # Errors
/// As [`checkpoint`]; those of the store.
pub fn checkpoint_in<V: Into<Deferred>>(
    store: Option<&dyn TensorStore>,
    tape: &Tape,
    inputs: &[&Var],
    f: impl Fn(&Tape, &[Var]) -> Result<Vec<V>> + 'static,
) -> Result<Vec<Var>> {
    let computed = |outputs: Vec<V>| outputs.into_iter().map(|output| output.into().compute()).collect();
    if !tape.is_recording() {
        let inputs: Vec<Var> = inputs.iter().map(|&input| input.clone()).collect();
        return computed(f(tape, &inputs)?);
    }
    for source in inputs.iter().filter_map(|input| input.source()) {
        tape.check_owner(OP, source)?;
    }
    let kept = Inputs::new(inputs);
    let trace = Tape::tracing();
    let entered = kept.enter(&trace, inputs.iter().map(|input| input.tensor().clone()), |_| true);
    let outputs: Vec<Var> = computed(f(&trace, &entered.vars)?)?;
    if trace.num_variables() != kept.sources.len() {
        let device = inputs.first().map_or_else(String::new, |input| input.tensor().device().name());
        return Err(Error::Unsupported { op: OP, what: "a variable made inside the function", device });
    }
    let plan = Outputs::new(&trace, &entered, &outputs)?;
    if !trace.traced_operators() {
        return Ok(plan.finish(outputs, &kept, None));
    }
    let parameters = trace.into_touched();
    let link = tape.link(OP, inputs, &parameters.iter().map(Some).collect::<Vec<_>>())?;
    drop(entered);
    let values = inputs.iter().map(|input| Value::keep(store, input.tensor())).collect::<Result<_>>()?;
    let (positions, num_outputs) = (plan.positions.clone(), outputs.len());
    let segment = Segment { inputs: kept.clone(), values, positions, num_outputs };
    let num_outputs = plan.positions.len();
    let node = link.node(num_outputs, Box::new(move |context, gradients| segment.backward(f, context, gradients)));
    Ok(plan.finish(outputs, &kept, node))
}

const OP: &str = "checkpoint";

/// Contents of an input until the backward pass.
enum Value {
    Here(Tensor),
    Stored(Box<dyn StoredTensor>),
}

impl Value {
    fn keep(store: Option<&dyn TensorStore>, tensor: &Tensor) -> Result<Self> {
        match store {
            None => Ok(Value::Here(tensor.clone())),
            Some(store) => store.put(tensor).map(Value::Stored),
        }
    }

    fn take(self) -> Result<Tensor> {
        match self {
            Value::Here(tensor) => Ok(tensor),
            Value::Stored(stored) => stored.take(),
        }
    }
}

/// Inputs of a checkpointed function, but for what they hold.
#[derive(Clone)]
struct Inputs {
    /// For each input that needs a gradient, its place in `sources`.
    slots: Vec<Option<usize>>,
    /// Distinct values among the inputs that need a gradient: one given twice must stay one, or its gradient would be
    /// summed in another order.
    sources: Vec<Source>,
}

/// Inputs as values on the function's own tape.
struct Entered {
    vars: Vec<Var>,
    /// Where each of [`Inputs::sources`] has become a variable.
    variables: Vec<Option<Source>>,
}

impl Inputs {
    fn new(inputs: &[&Var]) -> Self {
        let mut sources = Vec::new();
        let slot = |input: &&Var| {
            input.source().map(|source| {
                sources.iter().position(|&known| known == source).unwrap_or_else(|| {
                    sources.push(source);
                    sources.len() - 1
                })
            })
        };
        let slots = inputs.iter().map(slot).collect();
        Self { slots, sources }
    }

    fn enter(&self, tape: &Tape, values: impl IntoIterator<Item = Tensor>, wanted: impl Fn(Source) -> bool) -> Entered {
        let mut variables = vec![None; self.sources.len()];
        let enter = |(tensor, &slot): (Tensor, &Option<usize>)| match slot.filter(|&slot| wanted(self.sources[slot])) {
            None => Var::constant(tensor),
            Some(slot) => match variables[slot] {
                Some(source) => Var::new(tensor, Some(source)),
                None => {
                    let variable = tape.variable(tensor);
                    variables[slot] = variable.source();
                    variable
                }
            },
        };
        let vars = values.into_iter().zip(&self.slots).map(enter).collect();
        Entered { vars, variables }
    }
}

/// What an output of the function is to its caller.
enum Output {
    Constant,
    /// An input handed through, by its place in [`Inputs::sources`].
    Input(usize),
    /// An output of the node, by number.
    Node(usize),
}

struct Outputs {
    kinds: Vec<Output>,
    /// Where among the function's outputs each of the node's is found first.
    positions: Vec<usize>,
}

impl Outputs {
    fn new(trace: &Tape, entered: &Entered, outputs: &[Var]) -> Result<Self> {
        let mut positions: Vec<usize> = Vec::new();
        let mut kinds = Vec::with_capacity(outputs.len());
        for (position, output) in outputs.iter().enumerate() {
            let Some(source) = output.source() else {
                kinds.push(Output::Constant);
                continue;
            };
            trace.check_owner(OP, source)?;
            if let Some(slot) = entered.variables.iter().position(|&variable| variable == Some(source)) {
                kinds.push(Output::Input(slot));
                continue;
            }
            let known = positions.iter().position(|&earlier| outputs[earlier].source() == Some(source));
            kinds.push(Output::Node(known.unwrap_or(positions.len())));
            if known.is_none() {
                positions.push(position);
            }
        }
        Ok(Self { kinds, positions })
    }

    /// The outputs as values on the caller's tape.
    fn finish(self, outputs: Vec<Var>, kept: &Inputs, node: Option<(u64, usize)>) -> Vec<Var> {
        let finish = |(output, kind): (Var, Output)| {
            let source = match kind {
                Output::Constant => None,
                Output::Input(slot) => Some(kept.sources[slot]),
                Output::Node(output) => node.map(|(tape, node)| Source { tape, node, output }),
            };
            Var::new(output.into_tensor(), source)
        };
        outputs.into_iter().zip(self.kinds).map(finish).collect()
    }
}

/// What the node of a checkpointed function keeps.
struct Segment {
    inputs: Inputs,
    values: Vec<Value>,
    positions: Vec<usize>,
    num_outputs: usize,
}

impl Segment {
    fn backward<V: Into<Deferred>>(
        self,
        f: impl Fn(&Tape, &[Var]) -> Result<Vec<V>>,
        context: &mut Context<'_>,
        gradients: Vec<Option<Tensor>>,
    ) -> Result<()> {
        let Segment { inputs, values, positions, num_outputs } = self;
        let tape = Tape::new();
        let values = values.into_iter().map(Value::take).collect::<Result<Vec<_>>>()?;
        let Entered { vars, variables } = inputs.enter(&tape, values, |source| context.wants(Some(source)));
        let Inputs { sources, .. } = inputs;
        let outputs: Vec<Deferred> = f(&tape, &vars)?.into_iter().map(V::into).collect();
        drop(vars);
        if outputs.len() != num_outputs {
            let (field, value) = ("outputs", outputs.len().to_string());
            return Err(Error::InvalidSpec { op: OP, field, value, rule: "as many in every run of the function" });
        }
        let mut seeds = Vec::with_capacity(positions.len() + sources.len());
        for (position, gradient) in positions.into_iter().zip(gradients) {
            if let (Some(source), Some(gradient)) = (outputs[position].source(), gradient) {
                tape.check_owner(OP, source)?;
                seeds.push((source, gradient));
            }
        }
        drop(outputs);
        // Later uses of an input come first in its sum; starting from their part keeps the order of additions.
        for (&source, &variable) in sources.iter().zip(&variables) {
            if let Some(variable) = variable
                && let Some(pending) = context.take_pending(source)
            {
                seeds.push((variable, pending));
            }
        }
        let mut found = context.walk_segment(tape, seeds)?;
        for (source, variable) in sources.into_iter().zip(variables) {
            if let Some(gradient) = variable.and_then(|variable| found.remove(&variable.node)) {
                context.send(Some(source), gradient)?;
            }
        }
        Ok(())
    }
}
