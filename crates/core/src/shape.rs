//! Dimensions of a tensor.

/// Up to four dimensions, row-major: the last one is contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; Self::MAX_RANK],
    rank: usize,
}

impl Shape {
    /// Most dimensions a tensor can have.
    pub const MAX_RANK: usize = 4;

    /// Number of elements; 1 for rank 0.
    ///
    /// Saturates instead of wrapping, so that an absurd shape is refused by the allocator rather than served short.
    pub fn num_elements(&self) -> usize {
        self.iter().fold(1usize, |product, &dim| product.saturating_mul(dim))
    }

    /// Product of all dimensions but the last: the number of rows of a `[.., hidden_size]` tensor.
    pub fn rows(&self) -> usize {
        self[..self.rank.saturating_sub(1)].iter().fold(1usize, |product, &dim| product.saturating_mul(dim))
    }

    /// The last dimension; 1 for rank 0.
    pub fn last(&self) -> usize {
        self.as_ref().last().copied().unwrap_or(1)
    }
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        const { assert!(N <= Self::MAX_RANK, "a tensor has at most four dimensions") };
        let mut all = [0; Self::MAX_RANK];
        all[..N].copy_from_slice(&dims);
        Self { dims: all, rank: N }
    }
}

impl TryFrom<&[usize]> for Shape {
    type Error = crate::Error;

    /// # Errors
    /// [`crate::Error::InvalidSpec`] for more than four dimensions.
    fn try_from(dims: &[usize]) -> crate::Result<Self> {
        if dims.len() > Self::MAX_RANK {
            return Err(crate::Error::InvalidSpec {
                op: "shape",
                field: "rank",
                value: dims.len().to_string(),
                rule: "at most 4",
            });
        }
        let mut all = [0; Self::MAX_RANK];
        all[..dims.len()].copy_from_slice(dims);
        Ok(Self { dims: all, rank: dims.len() })
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", &**self)
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
