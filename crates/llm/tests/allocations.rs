//! What the system's allocator is asked for while a model trains: the pool's own counts do not see what goes past it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use unsloth_core::DType;
use unsloth_llm::{
    adapter::AdapterConfig,
    decoder::{Decoder, LoadOptions, Targets},
};
use unsloth_train::{Batch, Document, LoraConfig, Trainer, TrainerConfig};

/// Bytes of an allocation that counts.
const LARGE: usize = 64 << 10;

static NUM_LARGE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[allow(unsafe_code, reason = "an allocator is unsafe to write")]
// SAFETY: every call is the system's allocator's, with the arguments as they came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: the caller's promises.
        unsafe { System.realloc(block, layout, size) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(block, layout) }
    }
}

fn note(bytes: usize) {
    if bytes >= LARGE {
        NUM_LARGE.fetch_add(1, Relaxed);
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The only test of its program: what others allocate would count.
#[test]
fn no_step_after_the_second_allocates_much() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama/model");
    for dtype in [DType::F32, DType::BF16] {
        let device = unsloth_cpu::device();
        let mut decoder = Decoder::load(&folder, &device, LoadOptions::frozen(dtype)).unwrap();
        decoder.add_adapters(&AdapterConfig::new(LoraConfig::new(4, 8.0), Targets::AllLinear), 0).unwrap();
        let vocab_size = decoder.config().vocab_size as i32;
        let mut trainer = Trainer::new(decoder, TrainerConfig::default()).unwrap();
        // Enough tokens that every activation is large.
        let ids: Vec<i32> = (0..512).map(|i| i * 7 % vocab_size).collect();
        let documents = [(); 4].map(|()| Document { ids: &ids, targets: &ids });
        let batch = [Batch::new(&device, &documents).unwrap()];
        let mut steps = |count: usize| {
            let before = NUM_LARGE.load(Relaxed);
            for _ in 0..count {
                trainer.step(&batch).unwrap();
            }
            NUM_LARGE.load(Relaxed) - before
        };
        assert!(steps(2) > 20, "the first steps of {dtype} fill the pool");
        assert_eq!(steps(3), 0, "{dtype}");
    }
}
