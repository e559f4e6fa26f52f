//! What was checked, where, and how it failed.

use std::fmt::Display;

use unsloth_core::{Device, Error};

/// One set of arguments of one operator on one device, for messages.
#[derive(Clone, Debug)]
pub struct Case {
    op: &'static str,
    device: String,
    detail: String,
}

impl Case {
    /// `detail` says what is special: shapes, dtype, options, or the name of a hazard.
    pub fn new(device: &Device, op: &'static str, detail: impl Display) -> Self {
        Self { op, device: device.name(), detail: detail.to_string() }
    }

    /// A case without a device: what is checked is a reference.
    pub fn detached(op: &'static str) -> Self {
        Self { op, device: "no device".into(), detail: "reference".into() }
    }

    /// A failure of this case.
    pub fn failure(&self, kind: FailureKind) -> Failure {
        Failure(Box::new(Inner { case: Some(self.clone()), kind }))
    }

    /// The failure of a property that is not an error budget.
    pub fn hazard(&self, what: impl Into<String>) -> Failure {
        self.failure(FailureKind::Hazard { what: what.into() })
    }
}

impl Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}, {}", self.op, self.device, self.detail)
    }
}

/// How a check failed.
#[derive(Debug, thiserror::Error)]
pub enum FailureKind {
    /// A tensor is further from the oracle than it may be.
    #[error("`{tensor}`[{index}] = {actual:e}, oracle {exact:e}: error {error:e} is not within {limit:e}")]
    Budget {
        /// Name of the tensor.
        tensor: String,
        /// Element with the largest error.
        index: usize,
        /// What the device computed.
        actual: f64,
        /// What is right.
        exact: f64,
        /// Distance of the two.
        error: f64,
        /// What the distance may be.
        limit: f64,
    },
    /// A property does not hold: repeatability, accumulation, a typed error.
    #[error("{what}")]
    Hazard {
        /// The property and how it was violated.
        what: String,
    },
    /// An operator returned an error where it had to succeed.
    #[error("unexpected error: {}", with_causes(.0))]
    Op(Error),
}

/// An error and what caused it, down to the first.
fn with_causes(error: &Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A failed check: enough to find the case again. Boxed, since it travels through every `Result`.
#[derive(Debug)]
pub struct Failure(Box<Inner>);

#[derive(Debug)]
struct Inner {
    case: Option<Case>,
    kind: FailureKind,
}

impl Failure {
    /// How it failed.
    pub fn kind(&self) -> &FailureKind {
        &self.0.kind
    }

    /// Names the case, where the failure does not name one yet.
    pub fn within(mut self, case: &Case) -> Self {
        self.0.case.get_or_insert_with(|| case.clone());
        self
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(case) = &self.0.case {
            write!(f, "{case}: ")?;
        }
        Display::fmt(&self.0.kind, f)
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(Box::new(Inner { case: None, kind: FailureKind::Op(error) }))
    }
}

/// Result of a check.
pub type Checked<T = ()> = Result<T, Failure>;

/// Ends a suite: says which device ran it, or panics with the failure.
///
/// # Panics
/// If the suite failed.
pub fn finish(op: &str, device: &Device, result: Checked) {
    match result {
        Ok(()) => println!("{op}: passed on {}", device.name()),
        Err(failure) => panic!("{op}: failed on {}: {failure}", device.name()),
    }
}
