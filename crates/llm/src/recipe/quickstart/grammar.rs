//! A grammar of short stories, each with questions that nothing but its text answers.
//!
//! Somebody goes to a place, does something with a thing there, meets a friend and feels something about it. All of that is drawn
//! evenly and independently, so no question can be answered from how often a word occurs: one has to find it in the story, and of
//! two names the right one.

use super::{
    draws::Draws,
    words::{COLOURS, DEEDS, Deed, FEELINGS, PEOPLE, PLACES, Person, THINGS},
};

/// Which stories. A story is a function of seed, part and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// To learn the language from.
    Stories,
    /// To learn from how questions are answered.
    Lessons,
    /// Never learnt from.
    HeldOut,
}

/// What a question asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Who,
    Where,
    What,
    Colour,
    Friend,
    Feeling,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [Self::Who, Self::Where, Self::What, Self::Colour, Self::Friend, Self::Feeling];
}

/// Something that a story tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fact {
    pub(super) kind: Kind,
    /// In other words than the story has for it.
    pub(super) statement: String,
    pub(super) question: String,
    /// The word that the statement gives and the question asks for; it stands in the story.
    pub(super) word: &'static str,
}

/// A story and what it tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Story {
    /// Who it is about and whom they meet, as indices of [`PEOPLE`].
    pub(super) people: [usize; 2],
    pub(super) text: String,
    /// One of each kind.
    pub(super) facts: [Fact; 6],
    /// The end of the story as the corpus has it: the facts in other words and any order.
    pub(super) retelling: String,
}

impl Story {
    /// The story of this number.
    pub(super) fn draw(seed: u64, part: Part, index: u32) -> Self {
        let mut draws = Draws::new(seed, [part as u32, index]);
        let people = draw_people(&mut draws, part);
        let plot = Plot::draw(&mut draws, people.map(|index| PEOPLE[index]));
        let text = plot.tell(&mut draws);
        let facts = plot.facts();
        let retelling = plot.retell(&mut draws, &facts);
        Self { people, text, facts, retelling }
    }

    /// The story as it is learnt from: told, then retold.
    pub(super) fn whole(&self) -> String {
        format!("{} {}", self.text, self.retelling)
    }
}

/// Whether stories about these two are held out. The order does not matter, so that two people of a held-out story never meet in
/// one that is learnt from.
pub(super) fn is_held_out([first, second]: [usize; 2]) -> bool {
    (first + second).is_multiple_of(5)
}

fn draw_people(draws: &mut Draws, part: Part) -> [usize; 2] {
    let everyone: [usize; PEOPLE.len()] = std::array::from_fn(|index| index);
    loop {
        let people = draws.pick_two(&everyone);
        if is_held_out(people) == (part == Part::HeldOut) {
            return people;
        }
    }
}

/// What happens.
#[derive(Clone, Copy, Debug)]
struct Plot {
    hero: Person,
    friend: Person,
    place: &'static str,
    deed: Deed,
    colour: &'static str,
    thing: &'static str,
    feeling: &'static str,
}

const WEATHER: [&str; 4] = ["sunny", "windy", "cold", "warm"];
const MOVES: [&str; 3] = ["went", "walked", "ran"];
const INTERLUDES: [&str; 3] = ["Soon it began to rain.", "Then it was time to go home.", "The sun went down."];
const ENDINGS: [&str; 4] = ["It was a good day.", "Then they all went to bed.", "They laughed about it.", "The end."];

impl Plot {
    fn draw(draws: &mut Draws, [hero, friend]: [Person; 2]) -> Self {
        Self {
            hero,
            friend,
            place: draws.pick(&PLACES),
            deed: draws.pick(&DEEDS),
            colour: draws.pick(&COLOURS),
            thing: draws.pick(&THINGS),
            feeling: draws.pick(&FEELINGS),
        }
    }

    fn tell(&self, draws: &mut Draws) -> String {
        let mut sentences = vec![self.opening(draws), self.going(draws), self.doing(draws), self.speaking(draws)];
        let (meeting, feeling) = (self.meeting(draws), self.feeling(draws));
        let [first, second] = if draws.one_in(2) { [meeting, feeling] } else { [feeling, meeting] };
        sentences.extend([first, second]);
        if draws.one_in(3) {
            sentences.push(draws.pick(&INTERLUDES).to_owned());
        }
        sentences.join(" ")
    }

    fn opening(&self, draws: &mut Draws) -> String {
        let Person { name, noun, .. } = self.hero;
        match draws.below(4) {
            0 => format!("Once there was a {noun} named {name}."),
            1 => format!("{name} was a little {noun}."),
            2 => format!("One day {name} woke up early."),
            _ => format!("It was a {} day.", draws.pick(&WEATHER)),
        }
    }

    fn going(&self, draws: &mut Draws) -> String {
        let begin = if draws.one_in(3) { "In the morning " } else { "" };
        format!("{begin}{} {} to the {}.", self.hero.name, draws.pick(&MOVES), self.place)
    }

    fn doing(&self, draws: &mut Draws) -> String {
        let Self { hero, deed: Deed { past, .. }, colour, thing, .. } = self;
        match draws.below(4) {
            0 => format!("There {} {past} a {colour} {thing}.", hero.pronoun),
            1 => format!("There {} {past} a {colour} {thing}.", hero.name),
            2 => format!("{} {past} a {colour} {thing} there.", hero.begun),
            _ => format!("{} {past} a {colour} {thing} there.", hero.name),
        }
    }

    fn speaking(&self, draws: &mut Draws) -> String {
        let Self { hero, colour, thing, .. } = self;
        match draws.below(2) {
            0 => format!("\"A {colour} {thing}!\" said {}.", hero.name),
            _ => format!("\"The {thing} is {colour}!\" {} said.", hero.pronoun),
        }
    }

    fn meeting(&self, draws: &mut Draws) -> String {
        let (Person { name, pronoun, possessive, .. }, friend, thing) = (self.hero, self.friend.name, self.thing);
        let come = match draws.below(4) {
            0 => format!("Then {name} met {friend}."),
            1 => format!("Then {pronoun} met {friend}."),
            2 => format!("Then {friend} came along."),
            _ => format!("{name} met {possessive} friend {friend}."),
        };
        let look = match draws.below(4) {
            0 => format!("{friend} liked the {thing}."),
            1 => format!("{name} showed {friend} the {thing}."),
            2 => format!("They looked at the {thing}."),
            _ => "They played together.".to_owned(),
        };
        format!("{come} {look}")
    }

    fn feeling(&self, draws: &mut Draws) -> String {
        let (Person { name, begun, .. }, feeling) = (self.hero, self.feeling);
        match draws.below(4) {
            0 => format!("{begun} was so {feeling}."),
            1 => format!("{begun} felt very {feeling}."),
            2 => format!("{name} felt very {feeling}."),
            _ => format!("It made {name} {feeling}."),
        }
    }

    fn facts(&self) -> [Fact; 6] {
        let Self { hero: Person { name, .. }, friend, place, deed, colour, thing, feeling } = *self;
        let Deed { past, base, passive } = deed;
        let fact = |kind, statement, question, word| Fact { kind, statement, question, word };
        [
            fact(Kind::Who, format!("The {thing} was {passive} by {name}."), format!("Who {past} the {thing}?"), name),
            fact(Kind::Where, format!("{name} had been to the {place}."), format!("Where did {name} go?"), place),
            fact(Kind::What, format!("{name} had {passive} the {thing}."), format!("What did {name} {base}?"), thing),
            fact(
                Kind::Colour,
                format!("The colour of the {thing} was {colour}."),
                format!("What colour was the {thing}?"),
                colour,
            ),
            fact(Kind::Friend, format!("{name} had met {}.", friend.name), format!("Who met {name}?"), friend.name),
            fact(Kind::Feeling, format!("{name} was {feeling} about it."), format!("How did {name} feel?"), feeling),
        ]
    }

    fn retell(&self, draws: &mut Draws, facts: &[Fact; 6]) -> String {
        let Person { name, possessive, .. } = self.hero;
        let telling = match draws.below(3) {
            0 => format!("In the evening {name} told {possessive} mother about it."),
            1 => format!("At home {name} told the whole story."),
            _ => format!("Later {name} talked about the day."),
        };
        let mut statements = facts.each_ref().map(|fact| fact.statement.as_str());
        draws.shuffle(&mut statements);
        [&[telling.as_str()], &statements[..], &[draws.pick(&ENDINGS)]].concat().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const PARTS: [Part; 3] = [Part::Stories, Part::Lessons, Part::HeldOut];

    /// How many words each kind of question can ask for.
    const NUM_WORDS: [usize; 6] =
        [PEOPLE.len(), PLACES.len(), THINGS.len(), COLOURS.len(), PEOPLE.len(), FEELINGS.len()];

    #[test]
    fn a_story_is_a_function_of_seed_part_and_number() {
        let story = Story::draw(3, Part::Stories, 7);
        assert_eq!(Story::draw(3, Part::Stories, 7), story);
        for (seed, part, index) in [(4, Part::Stories, 7), (3, Part::Lessons, 7), (3, Part::Stories, 8)] {
            assert_ne!(Story::draw(seed, part, index).text, story.text);
        }
    }

    /// What makes the questions a test of reading.
    #[test]
    fn every_question_asks_for_one_word_of_the_story() {
        for part in PARTS {
            for index in 0..300 {
                let Story { people, text, facts, .. } = Story::draw(0, part, index);
                let words: Vec<&str> = text.split([' ', '.', ',', '!', '"']).collect();
                let questions: BTreeSet<&String> = facts.iter().map(|fact| &fact.question).collect();
                assert_eq!(questions.len(), Kind::ALL.len(), "{text}");
                for (fact, kind) in facts.iter().zip(Kind::ALL) {
                    assert_eq!(fact.kind, kind);
                    assert!(words.contains(&fact.word) && fact.question.ends_with('?'), "{fact:?} in {text}");
                    assert!(fact.statement.contains(fact.word), "{fact:?}");
                }
                assert!(people.iter().all(|&person| words.contains(&PEOPLE[person].name)), "{text}");
                for list in [&PLACES[..], &THINGS, &COLOURS, &FEELINGS] {
                    assert_eq!(list.iter().filter(|word| words.contains(word)).count(), 1, "{text}");
                }
            }
        }
    }

    #[test]
    fn held_out_people_never_meet_in_another_story() {
        let meetings = |part| -> BTreeSet<[usize; 2]> {
            let people = (0..3000).map(|index| Story::draw(0, part, index).people);
            people.map(|[a, b]| [a.min(b), a.max(b)]).collect()
        };
        let [stories, lessons, held_out] = PARTS.map(meetings);
        assert!(held_out.is_disjoint(&stories) && held_out.is_disjoint(&lessons));
        // Of 276 pairs, 5 divides the sum of 55.
        assert_eq!((stories.len(), lessons.len(), held_out.len()), (221, 221, 55));
        let known: BTreeSet<usize> = stories.iter().flatten().copied().collect();
        assert!(held_out.iter().flatten().all(|person| known.contains(person)));
    }

    #[test]
    fn the_corpus_neither_asks_nor_answers() {
        for index in 0..500 {
            let whole = Story::draw(0, Part::Stories, index).whole();
            assert!(!whole.contains('?') && !whole.contains("Answer"), "{whole}");
            assert!(whole.ends_with('.') && !whole.contains("  "), "{whole}");
        }
    }

    #[test]
    fn words_are_spread_evenly() {
        let mut counts: [BTreeMap<&str, usize>; 6] = Default::default();
        for index in 0..2000 {
            for (counts, fact) in counts.iter_mut().zip(Story::draw(0, Part::HeldOut, index).facts) {
                *counts.entry(fact.word).or_default() += 1;
            }
        }
        for (counts, num_words) in counts.into_iter().zip(NUM_WORDS) {
            assert_eq!(counts.len(), num_words);
            // Not all people are in equally many held-out pairs.
            assert!(counts.values().all(|&count| count < 2 * 2000 / num_words), "{counts:?}");
        }
    }
}
