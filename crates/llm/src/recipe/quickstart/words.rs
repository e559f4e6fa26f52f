//! The words that stories are made of.

/// Someone in a story.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Person {
    pub(super) name: &'static str,
    /// `he`
    pub(super) pronoun: &'static str,
    /// `He`, where a sentence begins.
    pub(super) begun: &'static str,
    /// `his`
    pub(super) possessive: &'static str,
    /// `boy`
    pub(super) noun: &'static str,
}

/// Something that is done to a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deed {
    /// `Tom found the ball.`
    pub(super) past: &'static str,
    /// `What did Tom find?`
    pub(super) base: &'static str,
    /// `The ball was found by Tom.`
    pub(super) passive: &'static str,
}

const fn she(name: &'static str) -> Person {
    Person { name, pronoun: "she", begun: "She", possessive: "her", noun: "girl" }
}

const fn he(name: &'static str) -> Person {
    Person { name, pronoun: "he", begun: "He", possessive: "his", noun: "boy" }
}

const fn deed(past: &'static str, base: &'static str, passive: &'static str) -> Deed {
    Deed { past, base, passive }
}

pub(super) const PEOPLE: [Person; 24] = [
    he("Tom"),
    she("Anna"),
    he("Ben"),
    she("Mia"),
    he("Leo"),
    she("Lily"),
    he("Max"),
    she("Ella"),
    he("Sam"),
    she("Zoe"),
    he("Jack"),
    she("Ruby"),
    he("Finn"),
    she("Nora"),
    he("Oscar"),
    she("Ivy"),
    he("Hugo"),
    she("Clara"),
    he("Noah"),
    she("Emma"),
    he("Theo"),
    she("Alice"),
    he("Felix"),
    she("Rosa"),
];

pub(super) const PLACES: [&str; 16] = [
    "park", "beach", "garden", "forest", "market", "school", "farm", "lake", "library", "bakery", "castle", "meadow",
    "zoo", "museum", "river", "station",
];

pub(super) const THINGS: [&str; 24] = [
    "ball", "kite", "book", "drum", "key", "hat", "cup", "bell", "boat", "box", "lamp", "map", "shell", "doll", "coin",
    "ring", "rope", "stone", "feather", "basket", "flute", "mirror", "spoon", "button",
];

pub(super) const COLOURS: [&str; 10] =
    ["red", "blue", "green", "yellow", "white", "black", "pink", "brown", "purple", "grey"];

pub(super) const FEELINGS: [&str; 8] = ["happy", "sad", "proud", "tired", "brave", "glad", "calm", "shy"];

pub(super) const DEEDS: [Deed; 6] = [
    deed("found", "find", "found"),
    deed("bought", "buy", "bought"),
    deed("made", "make", "made"),
    deed("lost", "lose", "lost"),
    deed("saw", "see", "seen"),
    deed("hid", "hide", "hidden"),
];
