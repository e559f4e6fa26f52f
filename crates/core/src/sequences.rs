//! Packed sequences and past keys.

use std::sync::Arc;

use crate::{Category, Device, Error, Result, Tensor};

fn to_i32(op: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::InvalidSpec {
        op,
        field: "length",
        value: value.to_string(),
        rule: "below 2^31",
    })
}

/// Boundaries of sequences packed along the token dimension. A padded batch is the special case of equal lengths.
#[derive(Clone, Debug)]
pub struct Sequences {
    cu_seqlens: Tensor,
    offsets: Arc<[usize]>,
    max_seqlen: usize,
}

impl Sequences {
    /// Sequences of these lengths, one after another; a length may be 0.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] if the total is 2^31 or more; [`Error::OutOfMemory`].
    pub fn from_lengths(device: &Device, lengths: &[usize]) -> Result<Self> {
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0usize);
        let mut total = 0usize;
        for &length in lengths {
            total = total.saturating_add(length);
            offsets.push(total);
        }
        let on_device = offsets.iter().map(|&o| to_i32("sequences", o)).collect::<Result<Vec<i32>>>()?;
        let cu_seqlens = device.from_slice(&on_device, [on_device.len()], Category::Activations)?;
        let max_seqlen = lengths.iter().copied().max().unwrap_or(0);
        Ok(Self { cu_seqlens, offsets: offsets.into(), max_seqlen })
    }

    /// Offsets on the device: i32 `[num_seqs + 1]`, first 0, last [`Sequences::num_tokens`].
    pub fn cu_seqlens(&self) -> &Tensor {
        &self.cu_seqlens
    }

    /// The same offsets on the host.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Number of sequences.
    pub fn num_seqs(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Length of the longest sequence.
    pub fn max_seqlen(&self) -> usize {
        self.max_seqlen
    }

    /// Tokens over all sequences.
    pub fn num_tokens(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// Positions that restart at 0 in each sequence: i32 `[num_tokens]`, on the host.
    pub fn positions(&self) -> Vec<i32> {
        // Every length fits i32: checked when the sequences were made.
        self.offsets.windows(2).flat_map(|pair| 0..(pair[1] - pair[0]) as i32).collect()
    }
}

/// One length per sequence, on the device and on the host.
#[derive(Clone, Debug)]
pub struct Lengths {
    tensor: Tensor,
    host: Arc<[usize]>,
}

impl Lengths {
    /// # Errors
    /// [`Error::InvalidSpec`] if a length is 2^31 or more; [`Error::OutOfMemory`].
    pub fn new(device: &Device, lengths: &[usize]) -> Result<Self> {
        let on_device = lengths.iter().map(|&l| to_i32("lengths", l)).collect::<Result<Vec<i32>>>()?;
        let tensor = device.from_slice(&on_device, [lengths.len()], Category::KvCache)?;
        Ok(Self { tensor, host: lengths.into() })
    }

    /// i32 `[num_seqs]`.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The same numbers on the host.
    pub fn host(&self) -> &[usize] {
        &self.host
    }
}

/// Past keys and values that attention reads where they lie; the past is never copied.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    /// `[num_seqs, capacity, num_kv_heads, head_dim]`
    pub k: &'a Tensor,
    /// `[num_seqs, capacity, num_kv_heads, head_dim]`
    pub v: &'a Tensor,
    /// Valid keys of each sequence, at most the capacity.
    pub lens: &'a Lengths,
}
