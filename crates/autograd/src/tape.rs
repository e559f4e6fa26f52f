//! The record of what was computed.

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    sync::atomic::{AtomicU64, Ordering},
};

use unsloth_core::{Error, Result, Tensor};

use crate::{
    Deferred, Parameter, ParameterId, Recompute, Var,
    backward::{Backward, Context},
    var::Source,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Record,
    Inference,
    /// The first run of a checkpointed function: tracks what depends on what and which parameters are used, saves nothing.
    Trace,
}

pub(crate) enum Kind {
    Variable,
    Operator(Backward),
    /// Nothing below this node wants a gradient.
    Pruned,
}

/// One operator call, or a variable.
pub(crate) struct Node {
    /// Nodes of the inputs that need a gradient.
    pub(crate) inputs: Vec<usize>,
    /// Trained parameters that the operator uses, in the order of first use.
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) kind: Kind,
    /// Gradients of the outputs, as far as they have arrived.
    pub(crate) pending: Vec<Option<Tensor>>,
}

#[derive(Default)]
struct Trace {
    touched: Vec<Parameter>,
    seen: HashSet<ParameterId>,
}

/// Records operators so that [`Tape::backward`] can give gradients. Belongs to one thread.
pub struct Tape {
    id: u64,
    mode: Mode,
    nodes: RefCell<Vec<Node>>,
    /// Nodes that a trace would have made: its sources need positions, although nothing is kept.
    num_traced: Cell<usize>,
    num_variables: Cell<usize>,
    trace: RefCell<Trace>,
    recompute: Cell<Recompute>,
}

impl Tape {
    fn with_mode(mode: Mode) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            mode,
            nodes: RefCell::default(),
            num_traced: Cell::new(0),
            num_variables: Cell::new(0),
            trace: RefCell::default(),
            recompute: Cell::default(),
        }
    }

    /// A tape that records.
    #[expect(
        clippy::new_without_default,
        reason = "`inference` is as much a default as `new`; the choice is spelt out"
    )]
    pub fn new() -> Self {
        Self::with_mode(Mode::Record)
    }

    /// A tape that records and saves nothing: evaluation and generation.
    pub fn inference() -> Self {
        Self::with_mode(Mode::Inference)
    }

    pub(crate) fn tracing() -> Self {
        Self::with_mode(Mode::Trace)
    }

    /// An input whose gradient [`Tape::backward`] gives; on an inference tape, a constant.
    pub fn variable(&self, tensor: Tensor) -> Var {
        self.num_variables.set(self.num_variables.get() + 1);
        let node = || Node { inputs: Vec::new(), parameters: Vec::new(), kind: Kind::Variable, pending: vec![None] };
        let source = self.push(node).map(|node| Source { tape: self.id, node, output: 0 });
        Var::new(tensor, source)
    }

    /// Which operators that are recorded from now on have their results computed again in the backward pass.
    pub fn set_recompute(&self, recompute: Recompute) {
        self.recompute.set(recompute);
    }

    pub(crate) fn recompute(&self) -> Recompute {
        self.recompute.get()
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn is_recording(&self) -> bool {
        self.mode == Mode::Record
    }

    pub(crate) fn is_inference(&self) -> bool {
        self.mode == Mode::Inference
    }

    pub(crate) fn num_variables(&self) -> usize {
        self.num_variables.get()
    }

    /// Whether a trace met any operator that would be recorded.
    pub(crate) fn traced_operators(&self) -> bool {
        self.num_traced.get() > self.num_variables.get()
    }

    /// Parameters that a trace met, in the order of first use.
    pub(crate) fn into_touched(self) -> Vec<Parameter> {
        self.trace.into_inner().touched
    }

    pub(crate) fn into_nodes(self) -> Vec<Node> {
        self.nodes.into_inner()
    }

    /// Position of the new node, unless this tape makes none.
    fn push(&self, node: impl FnOnce() -> Node) -> Option<usize> {
        match self.mode {
            Mode::Inference => None,
            Mode::Trace => Some(self.num_traced.replace(self.num_traced.get() + 1)),
            Mode::Record => {
                let mut nodes = self.nodes.borrow_mut();
                nodes.push(node());
                Some(nodes.len() - 1)
            }
        }
    }

    /// Decides whether an operator with these inputs and parameters is recorded.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] for an input that was recorded on another tape: its gradient would be lost.
    pub(crate) fn link(
        &self,
        op: &'static str,
        inputs: &[&Var],
        parameters: &[Option<&Parameter>],
    ) -> Result<Link<'_>> {
        self.link_sources(op, inputs.iter().map(|input| input.source()), parameters)
    }

    /// As [`Tape::link`], by where the inputs were recorded.
    pub(crate) fn link_sources(
        &self,
        op: &'static str,
        inputs: impl IntoIterator<Item = Option<Source>>,
        parameters: &[Option<&Parameter>],
    ) -> Result<Link<'_>> {
        let mut link = Link { tape: self, inputs: Vec::new(), parameters: Vec::new() };
        if self.mode == Mode::Inference {
            return Ok(link);
        }
        for source in inputs.into_iter().flatten() {
            self.check_owner(op, source)?;
            link.inputs.push(source.node);
        }
        link.parameters.extend(parameters.iter().copied().flatten().cloned());
        Ok(link)
    }

    pub(crate) fn check_owner(&self, op: &'static str, source: Source) -> Result<()> {
        if source.tape == self.id {
            return Ok(());
        }
        Err(Error::InvalidSpec {
            op,
            field: "input",
            value: "a value recorded on another tape".to_owned(),
            rule: "recorded on the tape that is passed, or a constant",
        })
    }
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tape({} nodes)", self.nodes.borrow().len())
    }
}

/// An operator call that is about to be recorded, if anything in it needs a gradient.
pub(crate) struct Link<'t> {
    tape: &'t Tape,
    inputs: Vec<usize>,
    parameters: Vec<Parameter>,
}

impl Link<'_> {
    /// Whether the closure given at the end will be kept; if not, nothing need be saved for it.
    pub(crate) fn saves(&self) -> bool {
        self.tape.is_recording() && self.needs_gradient()
    }

    fn needs_gradient(&self) -> bool {
        !(self.inputs.is_empty() && self.parameters.is_empty())
    }

    /// Records an operator with one output; `backward` gets its gradient.
    pub(crate) fn one(
        self,
        out: Tensor,
        backward: impl FnOnce(&mut Context<'_>, Tensor) -> Result<()> + 'static,
    ) -> Var {
        let source = self.record_one(backward);
        Var::new(out, source)
    }

    /// The same for an output that is computed if it is asked for.
    pub(crate) fn deferred(
        self,
        compute: impl FnOnce() -> Result<Tensor> + 'static,
        backward: impl FnOnce(&mut Context<'_>, Tensor) -> Result<()> + 'static,
    ) -> Deferred {
        let source = self.record_one(backward);
        Deferred::new(compute, source)
    }

    fn record_one(self, backward: impl FnOnce(&mut Context<'_>, Tensor) -> Result<()> + 'static) -> Option<Source> {
        let backward =
            move |context: &mut Context<'_>, gradients: Vec<Option<Tensor>>| match gradients.into_iter().next() {
                Some(Some(gradient)) => backward(context, gradient),
                _ => Ok(()),
            };
        let node = self.node(1, Box::new(backward));
        node.map(|(tape, node)| Source { tape, node, output: 0 })
    }

    /// Records an operator with two outputs; at least one of the gradients that `backward` gets is there.
    pub(crate) fn two(
        self,
        out: (Tensor, Tensor),
        backward: impl FnOnce(&mut Context<'_>, Option<Tensor>, Option<Tensor>) -> Result<()> + 'static,
    ) -> (Var, Var) {
        let backward = move |context: &mut Context<'_>, gradients: Vec<Option<Tensor>>| {
            let mut gradients = gradients.into_iter();
            let (first, second) = (gradients.next().flatten(), gradients.next().flatten());
            backward(context, first, second)
        };
        let node = self.node(2, Box::new(backward));
        let source = |output| node.map(|(tape, node)| Source { tape, node, output });
        (Var::new(out.0, source(0)), Var::new(out.1, source(1)))
    }

    /// Records an operator with any number of outputs; gives the tape and the node.
    pub(crate) fn node(self, num_outputs: usize, backward: Backward) -> Option<(u64, usize)> {
        if !self.needs_gradient() {
            return None;
        }
        let Link { tape, inputs, parameters } = self;
        if tape.mode == Mode::Trace {
            let mut trace = tape.trace.borrow_mut();
            for parameter in &parameters {
                if trace.seen.insert(parameter.id()) {
                    trace.touched.push(parameter.clone());
                }
            }
        }
        let node = || Node {
            inputs,
            parameters,
            kind: Kind::Operator(backward),
            pending: std::iter::repeat_with(|| None).take(num_outputs).collect(),
        };
        tape.push(node).map(|node| (tape.id, node))
    }
}
