//! Which documents make up which step.
//!
//! A step is up to `grad_accum` micro-batches, a micro-batch up to `batch_size` sequences, a sequence one document or, packed,
//! as many as fit. Documents of one sequence stay apart: attention does not cross them and positions restart. Every epoch
//! visits every document once; its last micro-batch and its last step may be smaller, so no step spans two epochs.

use std::collections::VecDeque;

use unsloth_core::rng::Philox;

use crate::{Error, Result, dataset::Dataset};

/// Stream of the document order, apart from the streams that initialise adapters (0, 1, 2, ..).
const ORDER_STREAM: u32 = 0x6f72_6472;

/// Sequences that still take documents while packing. More find better places at more search; beyond some dozens the fill
/// hardly changes.
const OPEN_SEQUENCES: usize = 32;

/// How documents are put into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Whether a sequence takes as many documents as fit, instead of one.
    pub packing: bool,
    /// Whether each epoch has its own order, instead of the data's.
    pub shuffle: bool,
    /// Of the order.
    pub seed: u64,
    /// Most tokens of a sequence, at least the longest document.
    pub max_seq_len: usize,
    /// Sequences of a micro-batch, at least 1.
    pub batch_size: usize,
    /// Micro-batches of a step, at least 1.
    pub grad_accum: usize,
}

/// The documents of one step: a list for each micro-batch.
pub type Step = Vec<Vec<usize>>;

/// Where in the data a step begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: u32,
    /// Micro-batches of the epoch before it.
    pub micro_batch: usize,
}

/// An endless, deterministic sequence of steps.
#[derive(Clone, Debug)]
pub struct Batches {
    lengths: Vec<usize>,
    options: BatchOptions,
    next: Position,
    /// What is left of the epoch, in order.
    micro_batches: VecDeque<Vec<usize>>,
}

impl Batches {
    /// Starts at the first step of epoch 0.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for a count of 0, a `max_seq_len` below the longest document, or no documents at all.
    pub fn new(dataset: &Dataset, options: BatchOptions) -> Result<Self> {
        Self::from_lengths(dataset.lengths(), options)
    }

    fn from_lengths(lengths: Vec<usize>, options: BatchOptions) -> Result<Self> {
        at_least("documents", lengths.len(), 1)?;
        at_least("batch_size", options.batch_size, 1)?;
        at_least("grad_accum", options.grad_accum, 1)?;
        at_least("max_seq_len", options.max_seq_len, lengths.iter().copied().max().unwrap_or(1))?;
        let next = Position { epoch: 0, micro_batch: 0 };
        let mut batches = Self { lengths, options, next, micro_batches: VecDeque::new() };
        batches.micro_batches = batches.micro_batches_of(0).into();
        Ok(batches)
    }

    /// Number of steps that cover this many epochs, rounded up to a whole step.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] unless `epochs` is above 0 and at most a million.
    pub fn num_steps(&self, epochs: f64) -> Result<usize> {
        if !(epochs > 0.0 && epochs <= 1e6) {
            let rule = "above 0 and at most 1000000".into();
            return Err(Error::InvalidOption { field: "epochs", value: epochs.to_string(), rule });
        }
        let whole = epochs.floor() as u32;
        let part = |steps: usize, share: f64| (steps as f64 * share).ceil() as usize;
        if !(self.options.packing && self.options.shuffle) {
            return Ok(part(self.steps_in(0), epochs));
        }
        // Packed, the number of sequences depends on the order, which differs from epoch to epoch.
        let complete: usize = (0..whole).map(|epoch| self.steps_in(epoch)).sum();
        let rest = epochs - f64::from(whole);
        Ok(complete + if rest > 0.0 { part(self.steps_in(whole), rest) } else { 0 })
    }

    /// The next step; after the last one of an epoch the next epoch begins.
    pub fn next_step(&mut self) -> Step {
        if self.micro_batches.is_empty() {
            self.next = Position { epoch: self.next.epoch.wrapping_add(1), micro_batch: 0 };
            self.micro_batches = self.micro_batches_of(self.next.epoch).into();
        }
        let count = self.options.grad_accum.min(self.micro_batches.len());
        self.next.micro_batch += count;
        self.micro_batches.drain(..count).collect()
    }

    /// Passes over this many steps.
    pub fn skip(&mut self, num_steps: usize) {
        (0..num_steps).for_each(|_| drop(self.next_step()));
    }

    /// Where the steps handed out so far end.
    pub fn position(&self) -> Position {
        self.next
    }

    fn steps_in(&self, epoch: u32) -> usize {
        let num_sequences = if self.options.packing { self.sequences_of(epoch).len() } else { self.lengths.len() };
        num_sequences.div_ceil(self.options.batch_size).div_ceil(self.options.grad_accum)
    }

    fn micro_batches_of(&self, epoch: u32) -> Vec<Vec<usize>> {
        self.sequences_of(epoch).chunks(self.options.batch_size).map(<[_]>::concat).collect()
    }

    fn sequences_of(&self, epoch: u32) -> Vec<Vec<usize>> {
        let shuffle = self.options.shuffle.then_some(self.options.seed);
        let order = order(self.lengths.len(), shuffle, epoch);
        if self.options.packing {
            pack(&self.lengths, &order, self.options.max_seq_len)
        } else {
            order.into_iter().map(|document| vec![document]).collect()
        }
    }
}

/// `0 .. count` as it is, or in the random order of this seed and epoch (Fisher and Yates, as Knuth's algorithm P).
pub fn order(count: usize, seed: Option<u64>, epoch: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let Some(seed) = seed else { return order };
    let stream = Philox::new(seed, ORDER_STREAM);
    for last in (1..count).rev() {
        let block = stream.block([epoch, last as u32, (last as u64 >> 32) as u32, 0]);
        let word = u64::from(block[0]) << 32 | u64::from(block[1]);
        // Multiply-shift into 0 ..= last; 64 bits make its bias immeasurable.
        let pick = (u128::from(word) * (last as u128 + 1)) >> 64;
        order.swap(last, pick as usize);
    }
    order
}

/// Puts documents into sequences of at most `max_seq_len` tokens: each, in the order given, into the first open sequence with
/// room. The oldest open sequence closes when there are too many, so the time is linear in the number of documents.
///
/// A document longer than `max_seq_len` has a sequence of its own. Every entry of `order` indexes `lengths`.
pub fn pack(lengths: &[usize], order: &[usize], max_seq_len: usize) -> Vec<Vec<usize>> {
    let mut sequences: Vec<Vec<usize>> = Vec::new();
    let mut open: VecDeque<(usize, usize)> = VecDeque::with_capacity(OPEN_SEQUENCES);
    for &document in order {
        let length = lengths[document];
        let place = open.iter().position(|&(_, room)| room >= length);
        match place.and_then(|place| open.get_mut(place)) {
            Some((sequence, room)) => {
                sequences[*sequence].push(document);
                *room -= length;
            }
            None => {
                if open.len() == OPEN_SEQUENCES {
                    open.pop_front();
                }
                open.push_back((sequences.len(), max_seq_len.saturating_sub(length)));
                sequences.push(vec![document]);
            }
        }
        open.retain(|&(_, room)| room > 0);
    }
    sequences
}

/// # Errors
/// [`Error::InvalidOption`] if the value is below the minimum.
pub(crate) fn at_least(field: &'static str, value: usize, minimum: usize) -> Result<()> {
    if value < minimum {
        return Err(Error::InvalidOption { field, value: value.to_string(), rule: format!("at least {minimum}") });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: BatchOptions =
        BatchOptions { packing: true, shuffle: true, seed: 0, max_seq_len: 64, batch_size: 3, grad_accum: 2 };

    /// Awkward document counts and lengths, from the generator that is not under test here.
    fn random_lengths(seed: u64) -> Vec<usize> {
        let stream = Philox::new(seed, 1);
        let count = 1 + stream.below([0; 4], 300);
        (0..count).map(|i| 1 + stream.below([1, i, 0, 0], 64) as usize).collect()
    }

    fn every_form() -> impl Iterator<Item = BatchOptions> {
        (0..32u64).map(|bits| BatchOptions {
            packing: bits & 1 == 1,
            shuffle: bits & 2 == 2,
            seed: bits / 4,
            max_seq_len: 64,
            batch_size: 1 + (bits / 4) as usize % 5,
            grad_accum: 1 + (bits / 8) as usize,
        })
    }

    #[test]
    fn an_epoch_visits_every_document_once() {
        for (case, options) in every_form().enumerate() {
            let lengths = random_lengths(case as u64);
            let mut batches = Batches::from_lengths(lengths.clone(), options).unwrap();
            for epoch in 0..3 {
                let mut seen: Vec<usize> = Vec::new();
                for _ in 0..batches.steps_in(epoch) {
                    let step = batches.next_step();
                    assert!((1..=options.grad_accum).contains(&step.len()));
                    assert!(step.iter().all(|documents| !documents.is_empty()));
                    seen.extend(step.iter().flatten());
                }
                seen.sort_unstable();
                assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>(), "{options:?}");
            }
        }
    }

    #[test]
    fn no_sequence_exceeds_the_limit_and_few_are_wasted() {
        for seed in 0..50 {
            let lengths = random_lengths(seed);
            let sequences = pack(&lengths, &order(lengths.len(), Some(seed), 0), 64);
            let fill = |sequence: &Vec<usize>| sequence.iter().map(|&document| lengths[document]).sum::<usize>();
            assert!(sequences.iter().all(|sequence| fill(sequence) <= 64));
            // First fit leaves at most one open sequence half empty; a closed one adds little to that.
            let lower_bound = lengths.iter().sum::<usize>().div_ceil(64);
            assert!(sequences.len() <= 2 * lower_bound + 1, "{} for {lower_bound}", sequences.len());
        }
    }

    #[test]
    fn first_fit_by_hand() {
        // 5 opens a; 4 does not fit beside it in 8 and opens b; 3 fills a; 4 fills b; 8 fills c; 1 opens d.
        assert_eq!(pack(&[5, 4, 3, 4, 8, 1], &[0, 1, 2, 3, 4, 5], 8), [vec![0, 2], vec![1, 3], vec![4], vec![5]]);
        assert_eq!(pack(&[9, 1], &[0, 1], 8), [[0], [1]]);
    }

    #[test]
    fn order_depends_on_seed_and_epoch_only() {
        assert_eq!(order(5, None, 3), [0, 1, 2, 3, 4]);
        assert_eq!(order(100, Some(7), 2), order(100, Some(7), 2));
        assert_ne!(order(100, Some(7), 2), order(100, Some(7), 3));
        assert_ne!(order(100, Some(7), 2), order(100, Some(8), 2));
        let steps = |options| {
            let mut batches = Batches::from_lengths(random_lengths(1), options).unwrap();
            (0..100).map(|_| batches.next_step()).collect::<Vec<_>>()
        };
        assert_eq!(steps(OPTIONS), steps(OPTIONS));
        assert_ne!(steps(OPTIONS), steps(BatchOptions { seed: 1, ..OPTIONS }));
    }

    #[test]
    fn positions_count_micro_batches_of_the_epoch() {
        let plain = BatchOptions { packing: false, ..OPTIONS };
        let mut batches = Batches::from_lengths(vec![4; 13], plain).unwrap();
        // 13 documents: 5 micro-batches of 3, 3 steps of 2 an epoch, the last of them short.
        let positions: Vec<(u32, usize)> = (0..5)
            .map(|_| {
                batches.next_step();
                (batches.position().epoch, batches.position().micro_batch)
            })
            .collect();
        assert_eq!(positions, [(0, 2), (0, 4), (0, 5), (1, 2), (1, 4)]);
        let mut skipped = Batches::from_lengths(vec![4; 13], plain).unwrap();
        skipped.skip(5);
        assert_eq!((skipped.position(), skipped.next_step()), (batches.position(), batches.next_step()));
    }

    #[test]
    fn shuffling_is_fair() {
        // 6000 orders of 3 elements: each of the 6 permutations about 1000 times (standard deviation 29).
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            *counts.entry(order(3, Some(seed), 0)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn steps_of_epochs() {
        let plain = BatchOptions { packing: false, ..OPTIONS };
        let batches = Batches::from_lengths(vec![4; 13], plain).unwrap();
        // 13 documents: 5 micro-batches of 3, 3 steps of 2.
        assert_eq!([0.1, 1.0, 1.5, 2.0].map(|epochs| batches.num_steps(epochs).unwrap()), [1, 3, 5, 6]);
        for epochs in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(batches.num_steps(epochs), Err(Error::InvalidOption { field: "epochs", .. })));
        }
        let packed = Batches::from_lengths(random_lengths(2), OPTIONS).unwrap();
        let by_hand = packed.steps_in(0) + packed.steps_in(1) + packed.steps_in(2).div_ceil(2);
        assert_eq!(packed.num_steps(2.5).unwrap(), by_hand);
    }

    #[test]
    fn unshuffled_unpacked_is_the_order_of_the_data() {
        let options = BatchOptions { packing: false, shuffle: false, batch_size: 2, grad_accum: 1, ..OPTIONS };
        let mut batches = Batches::from_lengths(vec![4; 5], options).unwrap();
        let steps: Vec<Step> = (0..4).map(|_| batches.next_step()).collect();
        assert_eq!(steps, [[vec![0, 1]], [vec![2, 3]], [vec![4]], [vec![0, 1]]]);
    }

    #[test]
    fn rejects_counts_of_zero_and_a_limit_below_the_data() {
        let refused = |lengths: &[usize], options| match Batches::from_lengths(lengths.to_vec(), options) {
            Err(Error::InvalidOption { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&[], OPTIONS), "documents");
        assert_eq!(refused(&[1], BatchOptions { batch_size: 0, ..OPTIONS }), "batch_size");
        assert_eq!(refused(&[1], BatchOptions { grad_accum: 0, ..OPTIONS }), "grad_accum");
        assert_eq!(refused(&[65], OPTIONS), "max_seq_len");
    }
}
