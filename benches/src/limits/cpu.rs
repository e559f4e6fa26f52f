//! Limits of the processor: products in registers alone, and streams through memory, on all threads at once.

use std::{
    hint::black_box,
    sync::Barrier,
    time::{Duration, Instant},
};

use unsloth_rs::DType;

use super::{Limits, Rate};

/// How long products run at a time: short, so that some run without being interrupted. The best counts, for it is a limit.
const SPRINT: Duration = Duration::from_millis(3);

/// How many times longer a measurement is that is to be as long as something else.
const MOST_SPRINTS: f64 = 32.0;

/// A loop over products in registers; returns the products' FLOPs per iteration times `iterations`.
type Kernel = fn(iterations: u64) -> u64;

/// Measures with `threads` threads, each rate for about `time`, streaming through `bytes` bytes.
pub fn measure(threads: usize, time: Duration, bytes: usize) -> (Limits, Products) {
    let faster = |a: Measured, b: Option<Measured>| {
        b.into_iter().fold(a, |a, b| if b.1.per_second > a.1.per_second { b } else { a })
    };
    let measured = |(name, kernel): (&str, Kernel)| {
        let sprint = Sprint::new(kernel, threads);
        let rate = Rate::new(sprint.best(time), name);
        (sprint, rate)
    };
    let tiles = tiles().map(measured);
    // Products of f32 are made of those of their parts where that is faster.
    let parts = tiles.as_ref().map(|(sprint, rate)| {
        let sprint = Sprint { products_of_one: PARTS_PRODUCTS, ..*sprint };
        (sprint, Rate::new(rate.per_second / PARTS_PRODUCTS, "a sixth of AMX tiles of bf16 in registers"))
    });
    let (f32, f32_flops) = faster(measured(fma()), parts);
    let (bf16, bf16_flops) = bf16_dot().map(measured).map(|dot| faster(dot, tiles)).unzip();
    let [read, copy] = streams(threads, time, bytes);
    let limits = Limits {
        f32_flops,
        bf16_flops,
        f16_flops: None,
        read_bytes: Rate::new(read, "sums of a buffer"),
        copy_bytes: Rate::new(copy, "copies of a buffer, bytes read and written"),
    };
    (limits, Products { f32, bf16 })
}

type Measured = (Sprint, Rate);

/// The products that [`Limits`] are about, to be measured again at any time.
#[derive(Debug)]
pub struct Products {
    f32: Sprint,
    bf16: Option<Sprint>,
}

impl Products {
    /// How long so many FLOPs of a type's products take at this moment: measured by as many, but for 3 ms at least and for about a tenth
    /// of a second at most.
    pub fn time(&self, dtype: DType, flops: f64) -> Duration {
        let bf16 = self.bf16.as_ref().filter(|_| dtype == DType::BF16);
        let sprint = bf16.unwrap_or(&self.f32);
        let sprints = (flops / sprint.flops()).clamp(1.0, MOST_SPRINTS);
        let run = Sprint { iterations: (sprints * sprint.iterations as f64) as u64, ..*sprint };
        Duration::from_secs_f64(flops / run.rate())
    }
}

/// Products that all threads make at once, for about [`SPRINT`].
#[derive(Debug)]
struct Sprint {
    kernel: Kernel,
    threads: usize,
    /// Of each thread.
    iterations: u64,
    /// How many of the kernel's products make one.
    products_of_one: f64,
}

impl Sprint {
    fn new(kernel: Kernel, threads: usize) -> Self {
        // As many iterations as one thread runs for about a sprint.
        let mut iterations = 1 << 10;
        loop {
            let start = Instant::now();
            black_box(kernel(iterations));
            if start.elapsed() >= SPRINT {
                break;
            }
            iterations *= 2;
        }
        Self { kernel, threads, iterations, products_of_one: 1.0 }
    }

    /// What all threads do.
    fn flops(&self) -> f64 {
        // A kernel is linear in its iterations: one tells what each does.
        self.threads as f64 * (self.kernel)(1) as f64 * self.iterations as f64 / self.products_of_one
    }

    /// FLOPs per second.
    fn rate(&self) -> f64 {
        let slowest = together(self.threads, |_| {
            black_box((self.kernel)(self.iterations));
        });
        self.flops() / slowest.as_secs_f64()
    }

    /// The highest rate within `time`.
    fn best(&self, time: Duration) -> f64 {
        let (start, mut best) = (Instant::now(), 0.0f64);
        while best == 0.0 || start.elapsed() < time {
            best = best.max(self.rate());
        }
        best
    }
}

/// Runs `work` on all threads at once and returns how long the slowest took from the common start.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let run = |thread: usize| {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                barrier.wait();
                let start = Instant::now();
                work(thread);
                start.elapsed()
            })
        };
        let handles: Vec<_> = (0..threads).map(run).collect();
        let times =
            handles.into_iter().map(|handle| handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        times.max().unwrap_or_default()
    })
}

/// Bytes per second that all threads read, and that they read and write in a copy.
fn streams(threads: usize, time: Duration, bytes: usize) -> [f64; 2] {
    let words = (bytes / size_of::<u64>() / threads).max(1);
    let sources: Vec<Vec<u64>> = (0..threads).map(|thread| vec![thread as u64 + 1; words]).collect();
    let targets: Vec<std::sync::Mutex<Vec<u64>>> =
        (0..threads).map(|_| std::sync::Mutex::new(vec![0; words])).collect();
    let read = |thread: usize| {
        // Several sums at once, so that their latency does not count; few enough for registers.
        let mut sums = [0u64; 16];
        for chunk in sources[thread].chunks_exact(16) {
            prefetch(chunk.as_ptr().wrapping_byte_add(PAGE));
            prefetch(chunk.as_ptr().wrapping_byte_add(PAGE + LINE));
            sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        }
        black_box(sums);
    };
    let copy = |thread: usize| {
        if let Ok(mut target) = targets[thread].lock() {
            target.copy_from_slice(black_box(&sources[thread]));
            black_box(&mut *target);
        }
    };
    let total = (threads * words * size_of::<u64>()) as f64;
    [stream(threads, time, total, read), stream(threads, time, 2.0 * total, copy)]
}

/// How far ahead a stream is asked for: processors foresee no more than a page by themselves.
const PAGE: usize = 4096;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Asks for a cache line, anywhere.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "an intrinsic on a pointer")]
fn prefetch(from: *const u64) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a hint about an address, which may be any.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: *const u64) {}

fn stream(threads: usize, time: Duration, bytes: f64, pass: impl Fn(usize) + Sync) -> f64 {
    together(threads, &pass);
    let (start, mut best) = (Instant::now(), 0.0f64);
    while best == 0.0 || start.elapsed() < time {
        best = best.max(bytes / together(threads, &pass).as_secs_f64());
    }
    best
}

/// Sums that are kept in registers at once: enough to cover the latency of two units, few enough for 32 registers, and for 16
/// of the narrower sets.
const SUMS: usize = 24;
#[cfg(target_arch = "x86_64")]
const SUMS_OF_16: usize = 12;

/// The widest fused multiply-add that the processor has.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "instructions that not every processor has")]
fn fma() -> (&'static str, Kernel) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    fn wide(iterations: u64) -> u64 {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(1.0); SUMS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
        iterations * (SUMS * 16 * 2) as u64
    }

    #[target_feature(enable = "avx2,fma")]
    fn narrow(iterations: u64) -> u64 {
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(1.0); SUMS_OF_16];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
        iterations * (SUMS_OF_16 * 8 * 2) as u64
    }

    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512F, just asked.
        ("AVX-512 FMA in registers", |iterations| unsafe { wide(iterations) })
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has AVX2 and FMA, just asked.
        ("AVX2 FMA in registers", |iterations| unsafe { narrow(iterations) })
    } else {
        ("multiplications and additions in registers", plain)
    }
}

/// Neon is part of the architecture.
#[cfg(target_arch = "aarch64")]
fn fma() -> (&'static str, Kernel) {
    fn neon(iterations: u64) -> u64 {
        let (x, y) = (black_box(0.999f32), black_box(0.001f32));
        let mut sums = [[1.0f32; 4]; SUMS];
        for _ in 0..iterations {
            for sum in sums.as_flattened_mut() {
                *sum = sum.mul_add(x, y);
            }
        }
        black_box(sums);
        iterations * (SUMS * 4 * 2) as u64
    }
    ("Neon FMA in registers", neon)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn fma() -> (&'static str, Kernel) {
    ("multiplications and additions in registers", plain)
}

/// What the compiler makes of separate multiplications and additions.
#[cfg(not(target_arch = "aarch64"))]
fn plain(iterations: u64) -> u64 {
    let (x, y) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = [[1.0f32; 4]; 12];
    for _ in 0..iterations {
        for sum in sums.as_flattened_mut() {
            *sum = *sum * x + y;
        }
    }
    black_box(sums);
    iterations * (12 * 4 * 2) as u64
}

/// Products of bf16 parts that make one of f32 with AMX.
const PARTS_PRODUCTS: f64 = 6.0;

/// Products of tiles of bf16, where the processor has them and the system lets this process use them.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "instructions that not every processor has")]
fn tiles() -> Option<(&'static str, Kernel)> {
    /// Eight tiles of sixteen rows of 64 bytes, of the only palette there is.
    static CONFIGURATION: [u8; 64] = {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            (bytes[16 + 2 * tile], bytes[48 + tile]) = (64, 16);
            tile += 1;
        }
        bytes
    };
    /// Four tiles of bf16 from 1/2 to 2 of either sign, as random as those of a model: a processor that multiplies the same number over and
    /// over needs less power, and may be faster for it.
    static NUMBERS: [u32; 1024] = {
        let (mut numbers, mut state, mut i) = ([0; 1024], 1u32, 0);
        while i < numbers.len() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            numbers[i] = 0x3F00_3F00 | state & 0x80FF_80FF;
            i += 1;
        }
        numbers
    };

    fn products(iterations: u64) -> u64 {
        // SAFETY: the backend has asked the system for tiles, which are given back at the end; four are read.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{configuration}]",
                "tileloadd tmm4, [{numbers} + {row}]",
                "tileloadd tmm5, [{numbers} + {row} + 1024]",
                "tileloadd tmm6, [{numbers} + {row} + 2048]",
                "tileloadd tmm7, [{numbers} + {row} + 3072]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {iterations}",
                "jnz 2b",
                "tilerelease",
                configuration = in(reg) CONFIGURATION.as_ptr(),
                numbers = in(reg) NUMBERS.as_ptr(),
                row = in(reg) 64usize,
                iterations = inout(reg) iterations.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly)
            );
        }
        iterations * 4 * 16 * 16 * 32 * 2
    }

    let is_there = unsloth_rs::cpu::Isa::available().any(|isa| isa == unsloth_rs::cpu::Isa::Amx);
    is_there.then_some(("AMX tiles of bf16 in registers", products as Kernel))
}

#[cfg(not(target_arch = "x86_64"))]
fn tiles() -> Option<(&'static str, Kernel)> {
    None
}

/// Dot products of bf16 pairs, where the processor has them.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "instructions that not every processor has")]
fn bf16_dot() -> Option<(&'static str, Kernel)> {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot(iterations: u64) -> u64 {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let (x, y) = (_mm512_cvtne2ps_pbh(x, x), _mm512_cvtne2ps_pbh(y, y));
        let mut sums = [_mm512_set1_ps(0.0); SUMS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, y);
            }
        }
        black_box(sums);
        iterations * (SUMS * 32 * 2) as u64
    }

    let is_there = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    // SAFETY: the processor has AVX-512F and AVX-512 BF16, just asked.
    is_there.then_some(("AVX-512 dot products of bf16 pairs in registers", |iterations| unsafe { dot(iterations) }))
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16_dot() -> Option<(&'static str, Kernel)> {
    None
}
