//! Host buffers that are reused from step to step.
//!
//! Training asks for the same sizes in every step; taking them from the system each time costs page faults that rival the
//! arithmetic. The pool keeps released blocks and serves a request with the smallest one that fits without much waste.
//!
//! Scratch is held for one operator call, nearly always one piece at a time, but in many sizes. Large pieces have blocks of their own, which
//! serve whatever fits, so that the largest one is all that waits.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use unsloth_core::{AllocationCounts, Category, ClassUsage, Error, Init, PoolUsage, Result};

use crate::{
    block::{Block, LINE_BYTES},
    ledger::{Charge, Ledger},
};

/// A block that nobody has asked for during this many allocations goes back to the system. One training step makes a few
/// thousand, so what a steady loop uses is never given up, and what odd sequence lengths left behind is.
const IDLE_ALLOCATIONS: u64 = 16 * 1024;

struct Idle {
    block: Block,
    since: u64,
}

/// What a block is lent for: blocks of one purpose do not serve the other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Buffer,
    /// A large piece of [`Category::Workspace`].
    Scratch,
}

/// Released blocks by capacity in lines; within one capacity the last released is reused first: it is warm in cache.
type Blocks = BTreeMap<usize, Vec<Idle>>;

#[derive(Default)]
struct State {
    idle: Blocks,
    idle_scratch: Blocks,
    idle_bytes: u64,
    resident_bytes: u64,
    tick: u64,
    counts: AllocationCounts,
    /// By capacity in lines; of blocks that wait, `idle` knows.
    classes: BTreeMap<usize, ClassUsage>,
}

/// Lines of the blocks that serve a request for so many: 16 sizes between a power of two and the next, so that lengths that
/// differ little share blocks and at most a sixteenth of a block is more than was asked for.
fn class(num_lines: usize) -> usize {
    num_lines.next_multiple_of((num_lines.next_power_of_two() / 32).max(1))
}

fn is_large(num_lines: usize) -> bool {
    num_lines * LINE_BYTES >= AllocationCounts::LARGE_BYTES
}

/// A pool of 64-byte aligned host blocks with a [`Ledger`].
pub struct HostPool {
    ledger: Arc<Ledger>,
    state: Mutex<State>,
}

impl HostPool {
    /// An empty pool that enters what it lends in `ledger`.
    pub fn new(ledger: Arc<Ledger>) -> Arc<Self> {
        Arc::new(Self { ledger, state: Mutex::new(State::default()) })
    }

    /// The account of this pool.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Lends a block of at least `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the budget or the system refuses; idle blocks are given back before the system is asked for
    /// more than the budget.
    pub fn allocate(self: &Arc<Self>, bytes: usize, category: Category, init: Init) -> Result<HostBlock> {
        let charge = self.ledger.charge(bytes, category)?;
        let num_lines = class(crate::round_up(bytes) / LINE_BYTES);
        let purpose = match category {
            Category::Workspace if is_large(num_lines) => Purpose::Scratch,
            _ => Purpose::Buffer,
        };
        let reused = self.take_idle(num_lines, purpose);
        let block = match reused {
            Some(mut block) => {
                if init == Init::Zero {
                    block.as_mut_slice()[..bytes].fill(0);
                }
                block
            }
            None => self.take_fresh(num_lines, purpose, &charge)?,
        };
        Ok(HostBlock { block, bytes, purpose, charge, pool: Arc::clone(self) })
    }

    fn take_idle(&self, num_lines: usize, purpose: Purpose) -> Option<Block> {
        let mut state = self.lock();
        state.tick += 1;
        // Large blocks may waste a quarter, small ones may be twice as large as needed; scratch is soon given back.
        let most = match purpose {
            Purpose::Scratch => usize::MAX,
            Purpose::Buffer if is_large(num_lines) => num_lines + num_lines / 4,
            Purpose::Buffer => num_lines * 2,
        };
        let all = state.idle_of(purpose);
        let capacity = *all.range(num_lines..=most).next()?.0;
        let blocks = all.get_mut(&capacity)?;
        let idle = blocks.pop()?;
        if blocks.is_empty() {
            all.remove(&capacity);
        }
        state.idle_bytes -= (capacity * LINE_BYTES) as u64;
        state.counts.reused += 1;
        let class = state.classes.entry(capacity).or_default();
        (class.num_reused, class.num_lent) = (class.num_reused + 1, class.num_lent + 1);
        Some(idle.block)
    }

    fn take_fresh(&self, num_lines: usize, purpose: Purpose, charge: &Charge) -> Result<Block> {
        let bytes = (num_lines * LINE_BYTES) as u64;
        let mut state = self.lock();
        let oldest = state.tick.saturating_sub(IDLE_ALLOCATIONS);
        state.release_idle(oldest);
        if purpose == Purpose::Scratch {
            // None that waits is large enough: this one takes their place.
            state.release_scratch();
        }
        if self.ledger.budget_bytes().is_some_and(|budget| state.resident_bytes + bytes > budget) {
            state.release_idle(u64::MAX);
        }
        let block = Block::zeroed(num_lines).ok_or_else(|| Error::OutOfMemory {
            device: "host".into(),
            requested_bytes: bytes,
            category: charge.category(),
            budget_bytes: self.ledger.budget_bytes().unwrap_or(u64::MAX),
            breakdown: Box::new(self.ledger.usage()),
        })?;
        state.resident_bytes += bytes;
        let class = state.classes.entry(num_lines).or_default();
        (class.num_fresh, class.num_lent) = (class.num_fresh + 1, class.num_lent + 1);
        if is_large(num_lines) {
            state.counts.fresh_large += 1;
        }
        Ok(block)
    }

    /// Gives all idle blocks back to the system.
    pub fn trim(&self) {
        self.lock().release_idle(u64::MAX);
    }

    /// What the pool holds.
    pub fn usage(&self) -> PoolUsage {
        let state = self.lock();
        PoolUsage { reserved_bytes: state.resident_bytes, idle_bytes: state.idle_bytes }
    }

    /// Every size of block that was ever lent, the smallest first, and how often.
    pub fn classes(&self) -> Vec<ClassUsage> {
        let state = self.lock();
        let waiting = |all: &Blocks, lines: &usize| all.get(lines).map_or(0, |blocks| blocks.len() as u64);
        let idle = |lines: &usize| waiting(&state.idle, lines) + waiting(&state.idle_scratch, lines);
        let class = |(lines, class): (&usize, &ClassUsage)| {
            let block_bytes = (lines * LINE_BYTES) as u64;
            ClassUsage { block_bytes, num_idle: idle(lines), ..*class }
        };
        state.classes.iter().map(class).collect()
    }

    /// How often memory was taken fresh or reused.
    pub fn counts(&self) -> AllocationCounts {
        self.lock().counts
    }

    /// The state is consistent between any two of its own statements that can panic, so a poisoned lock is usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn idle_of(&mut self, purpose: Purpose) -> &mut Blocks {
        match purpose {
            Purpose::Buffer => &mut self.idle,
            Purpose::Scratch => &mut self.idle_scratch,
        }
    }

    /// Frees idle blocks that were released before `tick`.
    fn release_idle(&mut self, tick: u64) {
        let freed = release(&mut self.idle, tick) + release(&mut self.idle_scratch, tick);
        self.forget(freed);
    }

    /// Frees all idle scratch.
    fn release_scratch(&mut self) {
        let freed = release(&mut self.idle_scratch, u64::MAX);
        self.forget(freed);
    }

    fn forget(&mut self, idle_bytes: u64) {
        self.idle_bytes -= idle_bytes;
        self.resident_bytes -= idle_bytes;
    }
}

/// Frees blocks that were released before `tick`; gives their bytes.
fn release(all: &mut Blocks, tick: u64) -> u64 {
    let mut freed = 0u64;
    all.retain(|&capacity, blocks| {
        let before = blocks.len();
        blocks.retain(|block| block.since >= tick);
        freed += ((before - blocks.len()) * capacity * LINE_BYTES) as u64;
        !blocks.is_empty()
    });
    freed
}

/// A lent block; dropping it returns it to its pool.
pub struct HostBlock {
    block: Block,
    bytes: usize,
    purpose: Purpose,
    charge: Charge,
    pool: Arc<HostPool>,
}

impl HostBlock {
    /// The bytes asked for.
    pub fn as_slice(&self) -> &[u8] {
        &self.block.as_slice()[..self.bytes]
    }

    /// The bytes asked for, for writing.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.block.as_mut_slice()[..self.bytes]
    }

    /// The entry in the ledger.
    pub fn charge(&self) -> &Charge {
        &self.charge
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        let block = std::mem::replace(&mut self.block, Block::empty());
        let num_lines = block.num_lines();
        if num_lines == 0 {
            return;
        }
        let mut state = self.pool.lock();
        let since = state.tick;
        state.idle_bytes += (num_lines * LINE_BYTES) as u64;
        if let Some(class) = state.classes.get_mut(&num_lines) {
            class.num_lent -= 1;
        }
        state.idle_of(self.purpose).entry(num_lines).or_default().push(Idle { block, since });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(budget_bytes: Option<u64>) -> Arc<HostPool> {
        HostPool::new(Ledger::new("cpu", budget_bytes))
    }

    #[test]
    fn reuses_what_was_released_and_is_aligned() {
        let pool = pool(None);
        let block = pool.allocate(1 << 20, Category::Activations, Init::Zero).unwrap();
        let address = block.as_slice().as_ptr() as usize;
        assert_eq!(address % 64, 0);
        drop(block);
        let again = pool.allocate((1 << 20) - 5000, Category::Activations, Init::Arbitrary).unwrap();
        assert_eq!(again.as_slice().as_ptr() as usize, address);
        assert_eq!(pool.counts(), AllocationCounts { fresh_large: 1, reused: 1 });
    }

    #[test]
    fn zero_means_zero_after_reuse() {
        let pool = pool(None);
        let mut block = pool.allocate(1000, Category::Workspace, Init::Arbitrary).unwrap();
        block.as_mut_slice().fill(7);
        drop(block);
        let block = pool.allocate(1000, Category::Workspace, Init::Zero).unwrap();
        assert_eq!(pool.counts().reused, 1);
        assert!(block.as_slice().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_much_larger_block_is_not_wasted_on_a_small_request() {
        let pool = pool(None);
        drop(pool.allocate(8 << 20, Category::Activations, Init::Arbitrary).unwrap());
        let _small = pool.allocate(1 << 20, Category::Activations, Init::Arbitrary).unwrap();
        assert_eq!(pool.counts().fresh_large, 2);
        assert_eq!(pool.usage(), PoolUsage { reserved_bytes: 9 << 20, idle_bytes: 8 << 20 });
        pool.trim();
        assert_eq!(pool.usage(), PoolUsage { reserved_bytes: 1 << 20, idle_bytes: 0 });
    }

    /// Calls that take one piece of scratch, or two, of different sizes, over and over: what waits is the largest of either.
    #[test]
    fn scratch_is_as_much_as_one_call_needs() {
        let pool = pool(None);
        let scratch = |bytes: usize| pool.allocate(bytes, Category::Workspace, Init::Arbitrary).unwrap();
        let kept = pool.allocate(3 << 20, Category::Activations, Init::Arbitrary).unwrap();
        for step in 0..3 {
            for bytes in [1 << 20, 5 << 20, 2 << 20] {
                drop(scratch(bytes));
            }
            let (_first, second) = (scratch(4 << 20), scratch(1 << 20));
            drop(second);
            let usage = pool.usage();
            assert_eq!((usage.reserved_bytes, usage.idle_bytes), (9 << 20, 1 << 20), "{step}");
        }
        // One block of scratch for 1 MiB, one for 5, and one for the second of two pieces.
        assert_eq!(pool.counts().fresh_large, 4);
        drop(kept);
        // Neither kind takes the other's blocks.
        let _kept = pool.allocate(5 << 20, Category::Activations, Init::Arbitrary).unwrap();
        assert_eq!(pool.counts().fresh_large, 5);
    }

    #[test]
    fn idle_blocks_make_room_within_the_budget() {
        let pool = pool(Some(3 << 20));
        drop(pool.allocate(2 << 20, Category::Activations, Init::Arbitrary).unwrap());
        let _block = pool.allocate(1 << 20, Category::Workspace, Init::Arbitrary).unwrap();
        assert_eq!(pool.usage().reserved_bytes, 3 << 20);
        let _other = pool.allocate(1 << 19, Category::Workspace, Init::Arbitrary).unwrap();
        assert_eq!(pool.usage().reserved_bytes, (1 << 20) + (1 << 19));
    }

    #[test]
    fn blocks_idle_for_long_are_given_back() {
        let pool = pool(None);
        drop(pool.allocate(1 << 20, Category::Activations, Init::Arbitrary).unwrap());
        for _ in 0..=IDLE_ALLOCATIONS {
            drop(pool.allocate(256, Category::Activations, Init::Arbitrary).unwrap());
        }
        let _block = pool.allocate(4 << 20, Category::Activations, Init::Arbitrary).unwrap();
        assert_eq!(pool.usage().idle_bytes, 256);
    }

    #[test]
    fn sizes_that_differ_little_share_a_class_and_little_is_wasted() {
        for num_lines in 1..5000 {
            let lines = class(num_lines);
            assert!(lines >= num_lines && (lines - num_lines) * 16 <= lines && class(lines) == lines, "{num_lines}");
        }
        let pool = pool(None);
        for bytes in [1_000_000, 1_010_000, 1_000_000] {
            drop(pool.allocate(bytes, Category::Activations, Init::Arbitrary).unwrap());
        }
        let (small, _held) = (4 * 256, pool.allocate(1_005_000, Category::Activations, Init::Arbitrary).unwrap());
        let _small = pool.allocate(small, Category::Activations, Init::Arbitrary).unwrap();
        let [few, many] = pool.classes()[..] else { panic!("{:?}", pool.classes()) };
        let counts = |class: ClassUsage| (class.num_lent, class.num_idle, class.num_fresh, class.num_reused);
        assert_eq!((few.block_bytes, counts(few)), (small as u64, (1, 0, 1, 0)));
        assert_eq!((many.block_bytes, counts(many)), (31 << 15, (1, 0, 1, 3)));
    }

    /// What is lent, what waits and what the ledger says add up at every moment.
    #[test]
    fn the_account_is_that_of_the_blocks() {
        let pool = pool(None);
        let mut held = Vec::new();
        // Large scratch may lie in a block of any size.
        let categories: Vec<Category> = Category::ALL.into_iter().filter(|&one| one != Category::Workspace).collect();
        for round in 0..200usize {
            let bytes = 1 + round * 7919 % 300_000;
            held.push(pool.allocate(bytes, categories[round % categories.len()], Init::Arbitrary).unwrap());
            if round % 3 == 0 {
                held.swap_remove(round * 31 % held.len());
            }
            let asked: u64 = held.iter().map(|block| crate::round_up(block.as_slice().len()) as u64).sum();
            assert_eq!(pool.ledger().usage().total_live_bytes(), asked);
            let classes = pool.classes();
            let of = |count: fn(&ClassUsage) -> u64| classes.iter().map(|class| class.block_bytes * count(class)).sum();
            let (lent, idle): (u64, u64) = (of(|class| class.num_lent), of(|class| class.num_idle));
            assert_eq!(pool.usage(), PoolUsage { reserved_bytes: lent + idle, idle_bytes: idle });
            // A released block may be a quarter larger than a large request and twice as large as a small one.
            assert!(lent >= asked && lent <= 2 * asked + asked / 8, "{lent} bytes lent for {asked}");
        }
        held.clear();
        assert_eq!(pool.ledger().usage().total_live_bytes(), 0);
        pool.trim();
        assert_eq!(pool.usage(), PoolUsage::default());
    }

    #[test]
    fn empty_blocks_are_fine() {
        let pool = pool(None);
        let block = pool.allocate(0, Category::Workspace, Init::Zero).unwrap();
        assert!(block.as_slice().is_empty());
    }
}
