//! The walk from the loss to the leaves.

use std::collections::HashMap;

use unsloth_core::{Category, DType, Error, Result, Tensor, ops::elementwise};

use crate::{
    GradStore, Parameter, Tape, Var,
    tape::{Kind, Node},
    var::Source,
};

/// Gets the gradients of a node's outputs (at least one is there), sends gradients to its inputs and adds to those of its
/// parameters.
pub(crate) type Backward = Box<dyn FnOnce(&mut Context<'_>, Vec<Option<Tensor>>) -> Result<()>>;

/// What one walk found for the variables of its tape, by node.
pub(crate) type VariableGradients = HashMap<usize, Tensor>;

/// Gradients of the variables of a tape.
#[derive(Debug)]
pub struct InputGradients {
    tape: u64,
    gradients: VariableGradients,
}

impl InputGradients {
    /// The gradient of a value made by [`Tape::variable`]: of its shape and type, `None` if the loss does not depend on it,
    /// if it was taken before, or if the value is not a variable of the tape.
    pub fn take(&mut self, variable: &Var) -> Option<Tensor> {
        let source = variable.source().filter(|source| source.tape == self.tape)?;
        self.gradients.remove(&source.node)
    }
}

impl Tape {
    /// Gradients of a loss, f32 `[1]`. Those of registered parameters are added to `gradients`, those of variables are
    /// returned; nothing else is computed. What a node saved is freed as soon as it has been used.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`]; [`Error::InvalidSpec`] for a loss that depends on nothing on this tape; errors of
    /// operators and hooks, after which `gradients` holds a part of the sum.
    pub fn backward(self, loss: &Var, gradients: &mut GradStore) -> Result<InputGradients> {
        if **loss.shape() != [1] {
            return Err(Error::Shape {
                op: "backward",
                arg: "loss",
                expected: "[1]".to_owned(),
                actual: *loss.shape(),
            });
        }
        if loss.dtype() != DType::F32 {
            let expected = DType::F32.to_string();
            return Err(Error::DType { op: "backward", arg: "loss", expected, actual: loss.dtype() });
        }
        let seed = loss.tensor().device().from_slice(&[1.0f32], [1], Category::Activations)?;
        self.backward_from(vec![(loss, seed)], gradients)
    }

    /// The same from several values whose gradients are given, each of its value's shape and type.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    pub fn backward_from(self, outputs: Vec<(&Var, Tensor)>, gradients: &mut GradStore) -> Result<InputGradients> {
        let mut seeds = Vec::with_capacity(outputs.len());
        for (output, gradient) in outputs {
            let Some(source) = output.source() else {
                let value = "a constant".to_owned();
                return Err(Error::InvalidSpec { op: "backward", field: "loss", value, rule: "recorded on this tape" });
            };
            self.check_owner("backward", source)?;
            seeds.push((source, checked_seed(output, gradient)?));
        }
        let tape = self.id();
        let mut remaining = vec![0; gradients.len()];
        let gradients = walk(self, seeds, Vec::new(), gradients, &mut remaining)?;
        Ok(InputGradients { tape, gradients })
    }
}

fn checked_seed(output: &Var, gradient: Tensor) -> Result<Tensor> {
    let (op, arg) = ("backward", "gradient");
    if gradient.shape() != output.shape() {
        return Err(Error::Shape { op, arg, expected: output.shape().to_string(), actual: *gradient.shape() });
    }
    if gradient.dtype() != output.dtype() {
        return Err(Error::DType { op, arg, expected: output.dtype().to_string(), actual: gradient.dtype() });
    }
    Ok(gradient)
}

/// What a node's closure works with.
pub(crate) struct Context<'a> {
    /// The nodes before the one at work; a gradient is wanted only where [`Kind::Pruned`] is not.
    nodes: Vec<Node>,
    /// Uses that the node at work stands for.
    parameters: Vec<Parameter>,
    gradients: &'a mut GradStore,
    /// Uses of each registered parameter that are still to come.
    remaining: &'a mut Vec<usize>,
}

/// Runs the nodes of a tape from last to first. `replaced` are uses that the tape's own ones take the place of.
fn walk(
    tape: Tape,
    seeds: Vec<(Source, Tensor)>,
    replaced: Vec<Parameter>,
    gradients: &mut GradStore,
    remaining: &mut Vec<usize>,
) -> Result<VariableGradients> {
    let mut nodes = tape.into_nodes();
    prune(&mut nodes, gradients);
    let mut context = Context { nodes, parameters: replaced, gradients, remaining };
    context.count_uses();
    context.release()?;
    for (source, gradient) in seeds {
        context.send(Some(source), gradient)?;
    }
    let mut variables = VariableGradients::new();
    while let Some(node) = context.nodes.pop() {
        context.parameters = node.parameters;
        match node.kind {
            Kind::Variable => {
                if let Some(gradient) = node.pending.into_iter().next().flatten() {
                    variables.insert(context.nodes.len(), gradient);
                }
            }
            Kind::Operator(backward) if node.pending.iter().any(Option::is_some) => {
                backward(&mut context, node.pending)?;
            }
            Kind::Operator(_) | Kind::Pruned => {}
        }
        context.release()?;
    }
    Ok(variables)
}

/// Drops what leads to no variable and no registered parameter.
fn prune(nodes: &mut [Node], gradients: &GradStore) {
    for index in 0..nodes.len() {
        let (before, rest) = nodes.split_at_mut(index);
        let node = &mut rest[0];
        let wanted = matches!(node.kind, Kind::Variable)
            || node.parameters.iter().any(|parameter| gradients.slot(parameter.id()).is_some())
            || node.inputs.iter().any(|&input| !matches!(before[input].kind, Kind::Pruned));
        if !wanted {
            node.kind = Kind::Pruned;
        }
    }
}

impl Context<'_> {
    /// Whether an input's gradient leads to a variable or a registered parameter.
    pub(crate) fn wants(&self, input: Option<Source>) -> bool {
        input.is_some_and(|source| !matches!(self.nodes[source.node].kind, Kind::Pruned))
    }

    /// Adds to the gradient of an input, in place where one of the buffers is unique.
    pub(crate) fn send(&mut self, input: Option<Source>, gradient: Tensor) -> Result<()> {
        let Some(source) = input.filter(|_| self.wants(input)) else {
            return Ok(());
        };
        let pending = &mut self.nodes[source.node].pending[source.output];
        // Addition commutes bit for bit, so either buffer may take the sum.
        *pending = Some(match pending.take() {
            None => gradient,
            Some(sum) if sum.is_unique() => elementwise::add(sum, &gradient)?,
            Some(sum) => elementwise::add(gradient, &sum)?,
        });
        Ok(())
    }

    /// The gradient that a registered parameter's is added to.
    pub(crate) fn gradient(&mut self, parameter: &Parameter) -> Option<&mut Tensor> {
        self.gradients.get_mut(parameter)
    }

    /// The same for two parameters that are not the same.
    pub(crate) fn gradient_pair(&mut self, a: &Parameter, b: &Parameter) -> (Option<&mut Tensor>, Option<&mut Tensor>) {
        self.gradients.pair_mut(a, b)
    }

    /// Takes back what an input's later uses have sent so far.
    pub(crate) fn take_pending(&mut self, input: Source) -> Option<Tensor> {
        self.nodes[input.node].pending[input.output].take()
    }

    /// Walks a tape whose nodes stand for the node at work.
    pub(crate) fn walk_segment(&mut self, tape: Tape, seeds: Vec<(Source, Tensor)>) -> Result<VariableGradients> {
        let replaced = std::mem::take(&mut self.parameters);
        walk(tape, seeds, replaced, self.gradients, self.remaining)
    }

    /// Walks a tape whose nodes stand for a part of the node at work: of what the node uses, other parts are still to come.
    pub(crate) fn walk_part(&mut self, tape: Tape, seeds: Vec<(Source, Tensor)>) -> Result<VariableGradients> {
        walk(tape, seeds, Vec::new(), self.gradients, self.remaining)
    }

    fn count_uses(&mut self) {
        for parameter in self.nodes.iter().flat_map(|node| &node.parameters) {
            if let Some(slot) = self.gradients.slot(parameter.id()) {
                self.remaining[slot] += 1;
            }
        }
    }

    /// Counts the uses of the node at work as done. In reverse order, as a node that stands for a checkpointed function
    /// lists parameters from first to last use.
    fn release(&mut self) -> Result<()> {
        for parameter in std::mem::take(&mut self.parameters).iter().rev() {
            if let Some(slot) = self.gradients.slot(parameter.id()) {
                self.remaining[slot] -= 1;
                if self.remaining[slot] == 0 {
                    self.gradients.ready(slot)?;
                }
            }
        }
        Ok(())
    }
}
