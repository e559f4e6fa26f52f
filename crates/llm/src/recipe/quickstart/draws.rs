//! Random choices of a story.

use unsloth_core::rng::Philox;

/// Stream of the stories, apart from those of initial weights, of the data's order and of sampling.
const STORY_STREAM: u32 = 0x7374_6f72;

/// The choices of one story: each depends on the seed, the story and how many choices came before it, never on other stories.
pub(super) struct Draws {
    stream: Philox,
    story: [u32; 2],
    count: u32,
}

impl Draws {
    pub(super) fn new(seed: u64, story: [u32; 2]) -> Self {
        Self { stream: Philox::new(seed, STORY_STREAM), story, count: 0 }
    }

    /// Below `bound`, which is neither 0 nor beyond 2^32.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        let counter = [self.story[0], self.story[1], self.count, 0];
        self.count += 1;
        self.stream.below(counter, bound as u32) as usize
    }

    /// One of `items`, which is not empty.
    pub(super) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// Two different ones of `items`.
    pub(super) fn pick_two<T: Copy>(&mut self, items: &[T]) -> [T; 2] {
        let first = self.below(items.len());
        let other = self.below(items.len() - 1);
        [items[first], items[other + usize::from(other >= first)]]
    }

    /// Whether one of `times` equal chances came.
    pub(super) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// Any order (Fisher and Yates).
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_has_its_own_choices() {
        let choices = |seed, story| {
            let mut draws = Draws::new(seed, story);
            (0..20).map(|_| draws.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(choices(1, [0, 5]), choices(1, [0, 5]));
        for (seed, story) in [(2, [0, 5]), (1, [1, 5]), (1, [0, 6])] {
            assert_ne!(choices(seed, story), choices(1, [0, 5]));
        }
    }

    #[test]
    fn every_choice_comes_up() {
        let mut draws = Draws::new(0, [0, 0]);
        let mut pairs = std::collections::BTreeMap::new();
        for _ in 0..1200 {
            *pairs.entry(draws.pick_two(&[1, 2, 3, 4])).or_insert(0) += 1;
        }
        // Twelve ordered pairs, each expected 100 times with a standard deviation below 10.
        assert_eq!(pairs.len(), 12);
        assert!(pairs.values().all(|count| (50..150).contains(count)), "{pairs:?}");
        let mut items: Vec<u32> = (0..50).collect();
        draws.shuffle(&mut items);
        assert!(!items.is_sorted());
        items.sort_unstable();
        assert!(items.into_iter().eq(0..50));
    }
}
