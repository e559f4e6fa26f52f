//! Past keys and values of generation: where they lie and how far each sequence has come.
//!
//! Storage and kernels are the device's; this decides the layout: contiguous, one block of `capacity` rows per sequence and
//! layer, written in place and never moved.

use unsloth_core::{
    Category, DType, Device, Error, KvView, Lengths, Result, Sequences, Tensor, ops::attention::kv_append,
};

/// Size of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheSpec {
    /// Attention layers.
    pub num_layers: usize,
    /// Sequences generated side by side.
    pub num_seqs: usize,
    /// Most tokens of one sequence, the prompt included.
    pub capacity: usize,
    /// Key and value heads of a layer.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Storage type, that of the activations.
    pub dtype: DType,
}

impl KvCacheSpec {
    /// Bytes of all keys and values, without rounding.
    pub fn num_bytes(&self) -> u64 {
        let rows = (2 * self.num_layers * self.num_seqs) as u64 * self.capacity as u64;
        rows * (self.num_kv_heads * self.head_dim * self.dtype.size_bytes()) as u64
    }
}

struct Layer {
    k: Tensor,
    v: Tensor,
    lens: Lengths,
}

/// Past keys and values of all layers.
pub struct KvCache {
    spec: KvCacheSpec,
    layers: Vec<Layer>,
}

impl KvCache {
    /// An empty cache; all of it is allocated now.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::UnsupportedDType`].
    pub fn new(device: &Device, spec: KvCacheSpec) -> Result<Self> {
        let lens = Lengths::new(device, &vec![0; spec.num_seqs])?;
        let shape = [spec.num_seqs, spec.capacity, spec.num_kv_heads, spec.head_dim];
        let half = || device.empty(shape, spec.dtype, Category::KvCache);
        let layer = |_| Ok(Layer { k: half()?, v: half()?, lens: lens.clone() });
        let layers = (0..spec.num_layers).map(layer).collect::<Result<Vec<_>>>()?;
        Ok(Self { spec, layers })
    }

    /// Its size.
    pub fn spec(&self) -> &KvCacheSpec {
        &self.spec
    }

    /// Appends the new keys and values of one layer, `[tokens, num_kv_heads, head_dim]` each, where sequence `s` of `seqs`
    /// goes behind what sequence `s` has already. Nothing counts as appended if it fails.
    ///
    /// # Errors
    /// Shape, dtype or device mismatch; a layer that does not exist; rows beyond the capacity.
    pub fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor, seqs: &Sequences) -> Result<()> {
        let start = self.layer(layer)?.lens.clone();
        let added = seqs.offsets().windows(2).map(|pair| pair[1] - pair[0]);
        let ends: Vec<usize> = start.host().iter().zip(added).map(|(start, added)| start + added).collect();
        // Layers advance together: all but the first share one device buffer of lengths.
        let same = self.layers.iter().map(|layer| &layer.lens).find(|lens| *lens.host() == *ends).cloned();
        let Layer { k: k_cache, v: v_cache, lens } = &mut self.layers[layer];
        kv_append(k_cache, k, seqs, &start)?;
        kv_append(v_cache, v, seqs, &start)?;
        *lens = match same {
            Some(lens) => lens,
            None => Lengths::new(k.device(), &ends)?,
        };
        Ok(())
    }

    /// Keys and values of one layer, for [`unsloth_core::ops::attention::cached`].
    ///
    /// # Errors
    /// A layer that does not exist.
    pub fn view(&self, layer: usize) -> Result<KvView<'_>> {
        let Layer { k, v, lens } = self.layer(layer)?;
        Ok(KvView { k, v, lens })
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        self.layers.get(layer).ok_or_else(|| Error::InvalidSpec {
            op: "kv_cache",
            field: "layer",
            value: layer.to_string(),
            rule: "below num_layers",
        })
    }
}
