//! Which of several kernels for one job a device runs fastest.

use cubecl::prelude::*;

/// What is known of a device: the kernel to take for a job. Both have names, which people read in files.
///
/// Kernels for one job may sum in another order, so a choice has to hold: between calls, and from one run to the next.
pub trait Choices: Send + Sync {
    /// The choice for a job, if it has been made.
    fn find(&self, job: &str) -> Option<String>;

    /// Keeps a choice that was measured, and returns the one that holds from now on: another one, if the job's had been made
    /// meanwhile, or `rule`, the one that needs no measuring, where the choice cannot be kept.
    fn keep(&self, job: &str, measured: &str, rule: &str) -> String;
}

/// Where kernels are launched.
pub struct Target<'a, R: Runtime> {
    /// The client to launch on.
    pub client: &'a ComputeClient<R>,
    /// What decides between kernels for the same job; without it, they are chosen by rule.
    pub choices: Option<&'a dyn Choices>,
}

/// By rule.
impl<'a, R: Runtime> From<&'a ComputeClient<R>> for Target<'a, R> {
    fn from(client: &'a ComputeClient<R>) -> Self {
        Self { client, choices: None }
    }
}

impl<R: Runtime> Clone for Target<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Runtime> Copy for Target<'_, R> {}
