//! Past keys and values.

use unsloth_core::{
    Category, DType, Device, Error, Sequences, Tensor,
    ops::attention::{self, Inputs, Options},
};
use unsloth_train::{KvCache, KvCacheSpec};

const SPEC: KvCacheSpec =
    KvCacheSpec { num_layers: 2, num_seqs: 2, capacity: 6, num_kv_heads: 2, head_dim: 4, dtype: DType::F32 };

/// Rows `[tokens, heads, head_dim]` of sequence-wise values, so that row `i` of sequence `s` is the same however it arrives.
fn rows(device: &Device, spans: &[std::ops::Range<usize>], heads: usize, salt: f32) -> Tensor {
    let row = |sequence: usize, position: usize| {
        (0..heads * SPEC.head_dim).map(move |c| (salt + (sequence * 50 + position * 9 + c) as f32).sin())
    };
    let spans = spans.iter().cloned().enumerate();
    let values: Vec<f32> = spans.flat_map(|(s, span)| span.flat_map(move |p| row(s, p))).collect();
    let tokens = values.len() / (heads * SPEC.head_dim);
    device.from_slice(&values, [tokens, heads, SPEC.head_dim], Category::Activations).unwrap()
}

fn sequences(device: &Device, spans: &[std::ops::Range<usize>]) -> Sequences {
    Sequences::from_lengths(device, &spans.iter().map(|span| span.len()).collect::<Vec<_>>()).unwrap()
}

/// Appends to every layer, with keys and values that differ from layer to layer.
fn append(cache: &mut KvCache, device: &Device, spans: &[std::ops::Range<usize>]) -> Result<(), Error> {
    let seqs = sequences(device, spans);
    for layer in 0..SPEC.num_layers {
        let salt = layer as f32;
        cache.append(layer, &rows(device, spans, 2, salt), &rows(device, spans, 2, salt + 0.5), &seqs)?;
    }
    Ok(())
}

#[test]
fn attention_over_the_cache_equals_attention_over_everything() {
    let device = unsloth_cpu::device();
    let mut cache = KvCache::new(&device, SPEC).unwrap();
    let rounds = [[0..3, 0..1], [3..4, 1..2], [4..5, 2..4]];
    for spans in &rounds {
        append(&mut cache, &device, spans).unwrap();
        let options = Options::causal(SPEC.head_dim);
        let (seq_q, all) = (sequences(&device, spans), [0..spans[0].end, 0..spans[1].end]);
        let seq_k = sequences(&device, &all);
        let q = rows(&device, spans, 4, 9.0);
        for layer in 0..SPEC.num_layers {
            let view = cache.view(layer).unwrap();
            assert_eq!(view.lens.host(), [spans[0].end, spans[1].end]);
            let lens = view.lens.tensor().to_vec::<i32>().unwrap();
            assert_eq!(lens, [spans[0].end as i32, spans[1].end as i32]);
            let cached = attention::cached(&q, &seq_q, view, options).unwrap().to_vec::<f32>().unwrap();
            let (k, v) = (rows(&device, &all, 2, layer as f32), rows(&device, &all, 2, layer as f32 + 0.5));
            let inputs = Inputs { q: &q, k: &k, v: &v, seq_q: &seq_q, seq_k: &seq_k };
            let whole = attention::forward(inputs, options).unwrap().out.to_vec::<f32>().unwrap();
            assert_eq!(cached.len(), whole.len());
            for (cached, whole) in cached.iter().zip(&whole) {
                assert!((cached - whole).abs() <= 1e-6, "layer {layer}: {cached} instead of {whole}");
            }
        }
    }
}

#[test]
fn a_full_sequence_is_refused_and_nothing_counts_as_appended() {
    let device = unsloth_cpu::device();
    let mut cache = KvCache::new(&device, SPEC).unwrap();
    append(&mut cache, &device, &[0..5, 0..2]).unwrap();
    let error = append(&mut cache, &device, &[5..7, 2..3]).unwrap_err();
    assert!(error.to_string().contains("capacity"), "{error}");
    assert_eq!(cache.view(0).unwrap().lens.host(), [5, 2]);
    append(&mut cache, &device, &[5..6, 2..3]).unwrap();
    assert_eq!(cache.view(1).unwrap().lens.host(), [6, 3]);
}

#[test]
fn rejects_what_does_not_fit() {
    let device = unsloth_cpu::device();
    let mut cache = KvCache::new(&device, SPEC).unwrap();
    assert_eq!(cache.view(2).err().unwrap().to_string(), "kv_cache: layer = 2, must be below num_layers");
    let (two, three) = (sequences(&device, &[0..1, 0..1]), sequences(&device, &[0..1, 0..1, 0..1]));
    let k = rows(&device, &[0..1, 0..1], 2, 0.0);
    assert!(matches!(cache.append(2, &k, &k, &two), Err(Error::InvalidSpec { field: "layer", .. })));
    let narrow = rows(&device, &[0..1, 0..1], 1, 0.0);
    assert!(matches!(cache.append(0, &k, &narrow, &two), Err(Error::Shape { .. })));
    let k = rows(&device, &[0..1, 0..1, 0..1], 2, 0.0);
    assert!(cache.append(0, &k, &k, &three).is_err(), "another number of sequences");
    assert_eq!(cache.view(0).unwrap().lens.host(), [0, 0]);
}

#[test]
fn bytes_are_known_before_they_are_held() {
    let device = unsloth_cpu::device();
    let spec = KvCacheSpec { num_seqs: 3, capacity: 32, num_layers: 5, ..SPEC };
    let cache = KvCache::new(&device, spec).unwrap();
    // 10 halves of 3 * 32 rows of 32 bytes, and 256 bytes of lengths.
    assert_eq!(spec.num_bytes(), 10 * 3 * 32 * 32);
    assert_eq!(device.usage().live_bytes[Category::KvCache.index()], spec.num_bytes() + 256);
    assert_eq!(*cache.spec(), spec);
    drop(cache);
    assert_eq!(device.usage().total_live_bytes(), 0);
}
