//! Examples held out of a data set, and examples that two sets share.

use std::collections::HashSet;

use unsloth_core::ops::cross_entropy::IGNORE_INDEX;

use super::{Dataset, Report};
use crate::{Error, Result, digest::Digest, packing};

/// Epoch of the order that examples are picked by: one that no run reaches, so that the pick tells nothing about the order of
/// training.
const SPLIT_EPOCH: u32 = u32::MAX;

impl Dataset {
    /// Takes a share of the examples, in (0, 1), out of the set: the number is rounded to the nearest, at least one is taken and
    /// at least one stays. The seed alone picks them; both sets keep the order of the data. What was dropped counts for the
    /// first set.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for fewer than two examples, or a share out of its range.
    pub fn split(self, share: f64, seed: u64) -> Result<(Self, Self)> {
        if !(share > 0.0 && share < 1.0) {
            let rule = "above 0 and below 1".to_owned();
            return Err(Error::InvalidOption { field: "eval_split", value: share.to_string(), rule });
        }
        let count = self.num_documents();
        if count < 2 {
            let rule = format!("used with at least 2 examples, there is {count}");
            return Err(Error::InvalidOption { field: "eval_split", value: share.to_string(), rule });
        }
        let num_taken = ((count as f64 * share).round() as usize).clamp(1, count - 1);
        let mut is_taken = vec![false; count];
        packing::order(count, Some(seed), SPLIT_EPOCH).into_iter().take(num_taken).for_each(|i| is_taken[i] = true);
        let mut kept = self.subset(|index| !is_taken[index]);
        kept.report.num_dropped = self.report.num_dropped;
        kept.report.num_truncated += self.num_dropped_truncated();
        Ok((kept, self.subset(|index| is_taken[index])))
    }

    fn subset(&self, keep: impl Fn(usize) -> bool) -> Self {
        let mut subset = Self::empty();
        for index in (0..self.num_documents()).filter(|&index| keep(index)) {
            let document = self.document(index);
            subset.ids.extend(document.ids);
            subset.targets.extend(document.targets);
            subset.offsets.push(subset.ids.len());
            subset.is_truncated.push(self.is_truncated[index]);
            let num_targets = document.targets.iter().filter(|&&target| target != IGNORE_INDEX).count();
            subset.report.num_examples += 1;
            subset.report.num_tokens += document.ids.len();
            subset.report.num_targets += num_targets;
            subset.report.num_truncated += usize::from(self.is_truncated[index]);
        }
        subset
    }

    /// Examples that were longer than the limit and have no target within it.
    fn num_dropped_truncated(&self) -> usize {
        let kept = self.is_truncated.iter().filter(|&&truncated| truncated).count();
        self.report.num_truncated - kept
    }

    /// How many examples of this set have the tokens of an example of `other`.
    pub fn num_shared_with(&self, other: &Self) -> usize {
        let known: HashSet<&[i32]> = (0..other.num_documents()).map(|index| other.document(index).ids).collect();
        (0..self.num_documents()).filter(|&index| known.contains(self.document(index).ids)).count()
    }

    /// SHA-256 of all ids, targets and lengths in their order, in hexadecimal digits.
    pub fn sha256(&self) -> String {
        let mut digest = Digest::default();
        digest.numbers(self.offsets.iter().map(|&offset| offset as i64));
        digest.numbers(self.ids.iter().chain(&self.targets).map(|&number| i64::from(number)));
        digest.finish()
    }

    pub(super) fn empty() -> Self {
        Self { ids: vec![], targets: vec![], offsets: vec![0], is_truncated: vec![], report: Report::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Labelled, *};

    /// Documents `[10], [10, 11], .., ` cut to 6 tokens, and one without a target.
    fn dataset(count: usize) -> Dataset {
        let mut dataset = Dataset::empty();
        for index in 0..count {
            let ids: Vec<i32> = (10..12 + index as i32).collect();
            dataset.push(&Labelled { labels: ids.clone(), ids }, 6);
        }
        dataset.push(&Labelled { ids: vec![1; 9], labels: vec![IGNORE_INDEX; 9] }, 6);
        dataset
    }

    fn documents(dataset: &Dataset) -> Vec<Vec<i32>> {
        (0..dataset.num_documents()).map(|index| dataset.document(index).ids.to_vec()).collect()
    }

    #[test]
    fn a_split_is_a_partition_in_order() {
        let whole = dataset(10);
        for (share, expected) in [(0.2, 2), (0.01, 1), (0.999, 9), (0.25, 3)] {
            let (kept, taken) = whole.clone().split(share, 7).unwrap();
            assert_eq!((kept.num_documents(), taken.num_documents()), (10 - expected, expected));
            let (kept_documents, taken_documents) = (documents(&kept), documents(&taken));
            // Lengths grow, then the cut makes the last ones equal.
            assert!(kept_documents.is_sorted() && taken_documents.is_sorted());
            let mut all = [kept_documents, taken_documents].concat();
            all.sort();
            assert_eq!(all, documents(&whole));
            let (a, b, sum) = (kept.report(), taken.report(), whole.report());
            let add = |field: fn(&Report) -> usize| (field(&a) + field(&b), field(&sum));
            for field in [
                |r: &Report| r.num_examples,
                |r: &Report| r.num_tokens,
                |r: &Report| r.num_targets,
                |r: &Report| r.num_truncated,
                |r: &Report| r.num_dropped,
            ] {
                let (parts, whole) = add(field);
                assert_eq!(parts, whole);
            }
        }
    }

    #[test]
    fn the_seed_alone_picks() {
        let pick = |seed| documents(&dataset(40).split(0.1, seed).unwrap().1);
        assert_eq!(pick(3), pick(3));
        assert_ne!(pick(3), pick(4));
    }

    #[test]
    fn shares_and_sets_that_cannot_be_split() {
        for share in [0.0, 1.0, -0.5, f64::NAN] {
            assert!(dataset(9).split(share, 0).unwrap_err().to_string().starts_with("eval_split = "));
        }
        let message = dataset(1).split(0.5, 0).unwrap_err().to_string();
        assert!(message.contains("at least 2 examples, there is 1"), "{message}");
    }

    #[test]
    fn shared_examples_are_counted() {
        let (mut one, mut other) = (Dataset::empty(), Dataset::empty());
        let push = |dataset: &mut Dataset, ids: &[i32]| {
            dataset.push(&Labelled { ids: ids.to_vec(), labels: ids.to_vec() }, 9);
        };
        for ids in [[1, 2], [3, 4], [3, 4], [5, 6]] {
            push(&mut one, &ids);
        }
        for ids in [&[3, 4][..], &[1, 2, 3], &[5, 6]] {
            push(&mut other, ids);
        }
        assert_eq!((one.num_shared_with(&other), other.num_shared_with(&one)), (3, 2));
        assert_eq!(one.num_shared_with(&Dataset::empty()), 0);
    }

    #[test]
    fn the_digest_sees_every_change() {
        let digest = |documents: &[&[i32]], label: i32| {
            let mut dataset = Dataset::empty();
            for ids in documents {
                let mut labels = ids.to_vec();
                labels[1] = label;
                dataset.push(&Labelled { ids: ids.to_vec(), labels }, 9);
            }
            dataset.sha256()
        };
        let all = [
            digest(&[&[1, 2, 3], &[4, 5]], 2),
            digest(&[&[1, 2], &[3, 4, 5]], 2),
            digest(&[&[4, 5], &[1, 2, 3]], 2),
            digest(&[&[1, 2, 3], &[4, 6]], 2),
            digest(&[&[1, 2, 3], &[4, 5]], 3),
        ];
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert_eq!(all[0], digest(&[&[1, 2, 3], &[4, 5]], 2));
    }
}
