//! Which kernel a device takes where several make the same product: by rule, or the fastest one, measured once and kept in a file.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use unsloth_common::Choices;

/// How kernels for the same job are chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choosing {
    /// Measured on a card, and kept in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`); by rule on a processor, whose
    /// software driver takes longer to compile a kernel than the fastest one saves. What opens a device by another way than its name
    /// knows no card, and chooses by rule.
    #[default]
    ByDevice,
    /// By rule.
    ByRule,
    /// Measured, and kept.
    Measured(Card),
    /// This one for every job that it can do, the rule's for others: for tests of a kernel.
    Always(String),
}

/// What choices belong to, and where they are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Folder of the file; made when something is kept.
    pub folder: PathBuf,
    /// What the driver calls the device.
    pub model: String,
    /// Driver and version.
    pub driver: String,
}

impl Choosing {
    /// On a card of which this much is known.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(crate) fn on_card(self, model: &str, driver: &str) -> Self {
        let folder = cache_folder().filter(|_| self == Self::ByDevice);
        let Some(folder) = folder else { return self };
        let (model, driver) = (model.to_owned(), driver.to_owned());
        Self::Measured(Card { folder, model, driver })
    }

    /// What decides, where the rule does not.
    pub(crate) fn open(self) -> Option<Box<dyn Choices>> {
        match self {
            Self::ByDevice | Self::ByRule => None,
            Self::Measured(card) => Some(Box::new(Kept::open(card))),
            Self::Always(name) => Some(Box::new(Always(name))),
        }
    }
}

/// The user's folder for what can be made again, and in it ours.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn cache_folder() -> Option<PathBuf> {
    let configured = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let folder = configured.or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
    Some(folder.join("unsloth-rs").join("choices"))
}

/// One choice for all jobs.
struct Always(String);

impl Choices for Always {
    fn find(&self, _job: &str) -> Option<String> {
        Some(self.0.clone())
    }

    fn keep(&self, _job: &str, _measured: &str, _rule: &str) -> String {
        self.0.clone()
    }
}

/// The choices of one device, driver and version of this crate.
struct Kept {
    card: Card,
    path: PathBuf,
    known: Mutex<BTreeMap<String, String>>,
}

/// The file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    device: String,
    driver: String,
    version: String,
    choices: BTreeMap<String, String>,
}

const HEAD: &str = "# The fastest ways of this device to make products of matrices, as unsloth-rs has measured them. Once this file is \
     deleted,\n# they are measured anew, and sums may be added up in another order.\n";

impl Kept {
    fn open(card: Card) -> Self {
        let name = format!("{} {} {}", card.model, card.driver, env!("CARGO_PKG_VERSION")).to_lowercase();
        let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        let path = card.folder.join(words.collect::<Vec<_>>().join("-")).with_added_extension("toml");
        let kept = Self { card, path, known: Mutex::new(BTreeMap::new()) };
        let choices = kept.read().unwrap_or_else(|reason| {
            // There is nobody to hand this to: the device opens all the same.
            eprintln!("warning: {}: not used, and to be replaced: {reason}", kept.path.display());
            kept.nothing()
        });
        *kept.known() = choices.choices;
        kept
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nothing(&self) -> Contents {
        let Card { model, driver, .. } = self.card.clone();
        Contents { device: model, driver, version: env!("CARGO_PKG_VERSION").to_owned(), choices: BTreeMap::new() }
    }

    /// What the file holds; nothing, if there is none.
    ///
    /// # Errors
    /// Why it cannot be used.
    fn read(&self) -> Result<Contents, String> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(self.nothing()),
            Err(error) => return Err(error.to_string()),
        };
        let Contents { device, driver, version, choices } =
            toml::from_str(&text).map_err(|error: toml::de::Error| error.to_string())?;
        let ours = self.nothing();
        if [&device, &driver, &version] == [&ours.device, &ours.driver, &ours.version] {
            Ok(Contents { choices, ..ours })
        } else {
            Err(format!("it is of {device} with {driver}, written by version {version}"))
        }
    }

    /// Adds a choice to the file, unless that has one already; returns all that it holds then.
    ///
    /// # Errors
    /// If the file cannot be written: then it is what it was.
    fn add(&self, job: &str, measured: &str) -> io::Result<BTreeMap<String, String>> {
        fs::create_dir_all(&self.card.folder)?;
        // Other processes measure too. The lock goes with the file's handle, however this returns.
        let lock = File::create(self.path.with_added_extension("lock"))?;
        lock.lock()?;
        let mut contents = self.read().unwrap_or_else(|_| self.nothing());
        if !contents.choices.contains_key(job) {
            contents.choices.insert(job.to_owned(), measured.to_owned());
            let text = toml::to_string(&contents).map_err(io::Error::other)?;
            replace(&self.path, &format!("{HEAD}{text}"))?;
        }
        Ok(contents.choices)
    }
}

/// Writes a file under another name and renames it: who reads meanwhile sees the old one or the new one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let unfinished = path.with_added_extension("unfinished");
    let mut file = File::create(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&unfinished, path)
}

impl Choices for Kept {
    fn find(&self, job: &str) -> Option<String> {
        self.known().get(job).cloned()
    }

    fn keep(&self, job: &str, measured: &str, rule: &str) -> String {
        let added = self.add(job, measured).unwrap_or_else(|error| {
            eprintln!("warning: {}: cannot keep a choice, the rule's is taken: {error}", self.path.display());
            BTreeMap::from([(job.to_owned(), rule.to_owned())])
        });
        let mut known = self.known();
        for (job, choice) in added {
            // What has been used in this process stays.
            known.entry(job).or_insert(choice);
        }
        known.get(job).cloned().unwrap_or_else(|| rule.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use unsloth_common::Choices;

    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    use super::Choosing;
    use super::{Card, Kept};

    fn card(folder: &Path) -> Card {
        let (model, driver) = ("Card (TM) 9000".to_owned(), "CUDA 13.0".to_owned());
        Card { folder: folder.to_path_buf(), model, driver }
    }

    fn file(folder: &Path) -> std::path::PathBuf {
        Kept::open(card(folder)).path
    }

    #[test]
    fn a_choice_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::open(card(&folder.path().join("made/when/needed")));
        assert_eq!(kept.find("a job"), None);
        assert_eq!(kept.keep("a job", "fast", "rule"), "fast");
        assert_eq!(kept.keep("another \"job\"", "rule", "rule"), "rule");
        let again = Kept::open(kept.card.clone());
        assert_eq!(again.find("a job").as_deref(), Some("fast"));
        assert_eq!(again.find("another \"job\"").as_deref(), Some("rule"));
        let text = fs::read_to_string(&kept.path).unwrap();
        assert!(text.contains("device = \"Card (TM) 9000\"\n") && text.contains("\"a job\" = \"fast\"\n"), "{text}");
        assert!(
            kept.path.ends_with(format!("card-tm-9000-cuda-13-0-{}.toml", env!("CARGO_PKG_VERSION").replace('.', "-")))
        );
    }

    #[test]
    fn the_first_choice_holds() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (Kept::open(card(folder.path())), Kept::open(card(folder.path())));
        assert_eq!(first.keep("a job", "fast", "rule"), "fast");
        // As another process would that has measured at the same time.
        assert_eq!(second.keep("a job", "faster", "rule"), "fast");
        assert_eq!(second.find("a job").as_deref(), Some("fast"));
    }

    #[test]
    fn nothing_is_lost_where_many_write() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let kept = Kept::open(card(folder.path()));
                scope.spawn(move || {
                    for job in 0..8 {
                        kept.keep(&format!("job {writer} {job}"), "fast", "rule");
                    }
                });
            }
        });
        assert_eq!(Kept::open(card(folder.path())).known().len(), 64);
    }

    #[test]
    fn a_damaged_file_is_not_used() {
        for damage in ["", "choices = 3", "\u{0}\u{0}", "[choices]\n\"a job\" = \"fast\"\n"] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(file(folder.path()), damage).unwrap();
            let kept = Kept::open(card(folder.path()));
            assert!(kept.read().is_err(), "{damage:?}");
            assert_eq!(kept.find("a job"), None, "{damage:?}");
            assert_eq!(kept.keep("a job", "faster", "rule"), "faster");
            assert_eq!(Kept::open(card(folder.path())).find("a job").as_deref(), Some("faster"), "{damage:?}");
        }
    }

    #[test]
    fn another_devices_file_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::open(card(folder.path()));
        kept.keep("a job", "fast", "rule");
        // The same name of the file, from other names of the device.
        let other = Card { model: "Card TM 9000".to_owned(), ..card(folder.path()) };
        let other = Kept::open(other);
        assert_eq!(other.path, kept.path);
        assert_eq!(other.find("a job"), None);
        assert!(other.read().unwrap_err().contains("Card (TM) 9000"));
    }

    #[test]
    fn what_cannot_be_kept_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let in_the_way = folder.path().join("file");
        fs::write(&in_the_way, "").unwrap();
        let kept = Kept::open(card(&in_the_way));
        assert_eq!(kept.keep("a job", "fast", "rule"), "rule");
        // It is not measured again and again.
        assert_eq!(kept.find("a job").as_deref(), Some("rule"));
    }

    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    #[test]
    fn only_what_is_left_to_the_device_is_measured() {
        assert_eq!(Choosing::ByRule.on_card("Card", "1"), Choosing::ByRule);
        let always = Choosing::Always("fast".to_owned());
        assert_eq!(always.clone().on_card("Card", "1"), always);
        assert!(matches!(Choosing::ByDevice.on_card("Card", "1"), Choosing::Measured(card) if card.model == "Card"));
        assert!(Choosing::ByDevice.open().is_none() && Choosing::ByRule.open().is_none());
    }
}
