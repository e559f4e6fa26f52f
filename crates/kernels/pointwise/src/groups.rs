//! Several tensors in one launch.

use cubecl::prelude::*;
use unsloth_common::Launch;

/// The tensors that are not empty, by the width of the vectors that they are read in, the widest first, in their order otherwise:
/// all tensors of a launch are read alike.
pub(crate) fn by_width<R: Runtime, T: Copy>(
    launch: &Launch<'_, R>,
    tensors: &[T],
    len: impl Fn(&T) -> usize,
) -> Vec<(usize, Vec<T>)> {
    let mut groups: Vec<(usize, Vec<T>)> = Vec::new();
    for tensor in tensors.iter().filter(|tensor| len(tensor) > 0) {
        let width = launch.vector_width::<f32>(len(tensor));
        match groups.iter_mut().find(|(of_group, _)| *of_group == width) {
            Some((_, group)) => group.push(*tensor),
            None => groups.push((width, vec![*tensor])),
        }
    }
    groups.sort_by_key(|(width, _)| std::cmp::Reverse(*width));
    groups
}
