//! Two reports side by side.

use std::{collections::HashMap, fmt};

use crate::{
    case::Id,
    report::{Entry, Report, seconds},
};

/// One thing that both reports timed.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// What, and with how many threads.
    pub id: (Id, usize),
    /// Medians in seconds, before and after.
    pub medians: [f64; 2],
}

impl Change {
    /// Time after over time before: above 1 it has become slower.
    pub fn ratio(&self) -> f64 {
        self.medians[1] / self.medians[0]
    }
}

/// What both reports timed, the largest slow-down first, and what only one of them did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// In both.
    pub changes: Vec<Change>,
    /// In the first alone.
    pub gone: Vec<Id>,
    /// In the second alone.
    pub new: Vec<Id>,
}

impl Comparison {
    /// Of `before` with `after`.
    pub fn of(before: &Report, after: &Report) -> Self {
        let key = |entry: &Entry| (entry.id.clone(), entry.threads);
        let mut old: HashMap<(Id, usize), f64> =
            before.results.iter().map(|entry| (key(entry), entry.timing.median_s)).collect();
        let mut comparison = Self::default();
        for entry in &after.results {
            match old.remove(&key(entry)) {
                Some(median) => {
                    comparison.changes.push(Change { id: key(entry), medians: [median, entry.timing.median_s] });
                }
                None => comparison.new.push(entry.id.clone()),
            }
        }
        let gone = before.results.iter().filter(|entry| old.contains_key(&key(entry)));
        comparison.gone = gone.map(|entry| entry.id.clone()).collect();
        comparison.changes.sort_by(|a, b| b.ratio().total_cmp(&a.ratio()));
        comparison
    }

    /// Those that take more than `threshold` times as long; also what is not a number.
    pub fn regressions(&self, threshold: f64) -> Vec<&Change> {
        self.changes
            .iter()
            .filter(|change| !matches!(change.ratio().partial_cmp(&threshold), Some(order) if order.is_le()))
            .collect()
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ratio   before        after         what")?;
        for change in &self.changes {
            let [before, after] = change.medians.map(seconds);
            let (id, threads) = &change.id;
            writeln!(f, "{:<7.3} {before:<13} {after:<13} {id}, {threads} threads", change.ratio())?;
        }
        self.gone.iter().try_for_each(|id| writeln!(f, "only before: {id}"))?;
        self.new.iter().try_for_each(|id| writeln!(f, "only after: {id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::Comparison;
    use crate::report::tests::{entry, report};

    #[test]
    fn finds_what_is_slower_new_and_gone() {
        let before = report(vec![entry(1, 2, 1.0), entry(2, 2, 1.0), entry(3, 2, 1.0), entry(4, 2, 1.0)]);
        let after = report(vec![entry(1, 2, 1.05), entry(2, 2, 1.2), entry(3, 1, 9.0), entry(4, 2, f64::NAN)]);
        let comparison = Comparison::of(&before, &after);
        assert_eq!(comparison.changes.len(), 3);
        let slower: Vec<_> = comparison.regressions(1.1).iter().map(|change| change.id.0.shape.clone()).collect();
        // NaN is no measurement: it does not pass for one that is fast.
        assert_eq!(slower, ["4 x 4 on 4 x 2, 16", "2 x 4 on 2 x 2, 16"]);
        assert_eq!((comparison.gone.len(), comparison.new.len()), (1, 1));
        assert!(comparison.regressions(1.3).len() == 1 && comparison.to_string().contains("1.200"));
    }
}
