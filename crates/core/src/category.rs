//! What memory is held for.

/// Purpose of an allocation. Every byte on a device belongs to exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Category {
    /// Frozen or trained base weights.
    Weights,
    /// Trained low-rank adapters.
    Adapters,
    /// Parameter gradients.
    Gradients,
    /// Optimiser state.
    Optimiser,
    /// Outputs of operators, and what the tape holds for the backward pass.
    Activations,
    /// Past keys and values of generation.
    KvCache,
    /// Scratch that lives within one operator call.
    Workspace,
}

impl Category {
    /// All categories in display order.
    pub const ALL: [Category; 7] = [
        Category::Weights,
        Category::Adapters,
        Category::Gradients,
        Category::Optimiser,
        Category::Activations,
        Category::KvCache,
        Category::Workspace,
    ];

    /// Snake-case name, used in JSON and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Category::Weights => "weights",
            Category::Adapters => "adapters",
            Category::Gradients => "gradients",
            Category::Optimiser => "optimiser",
            Category::Activations => "activations",
            Category::KvCache => "kv_cache",
            Category::Workspace => "workspace",
        }
    }

    /// Position in [`Category::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl std::fmt::Display for Category {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes held on one device, by [`Category`]. Sizes are what the ledger counts: rounded up to 256 bytes a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes held now, indexed by [`Category::index`].
    pub live_bytes: [u64; Category::ALL.len()],
    /// Highest value each category has had, each at its own time.
    pub peak_bytes: [u64; Category::ALL.len()],
    /// What each category held when the total was highest.
    pub at_peak_bytes: [u64; Category::ALL.len()],
}

impl Usage {
    /// Bytes held now over all categories.
    pub fn total_live_bytes(&self) -> u64 {
        self.live_bytes.iter().sum()
    }

    /// What one category held when the total was highest.
    pub fn at_peak(&self, category: Category) -> u64 {
        self.at_peak_bytes[category.index()]
    }

    /// Highest total since the last reset.
    pub fn total_peak_bytes(&self) -> u64 {
        self.at_peak_bytes.iter().sum()
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut separator = "";
        for (category, bytes) in Category::ALL.iter().zip(self.live_bytes) {
            if bytes > 0 {
                write!(f, "{separator}{category} {bytes}")?;
                separator = ", ";
            }
        }
        if separator.is_empty() { f.write_str("nothing") } else { Ok(()) }
    }
}
