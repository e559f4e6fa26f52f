//! Folders that appear whole and disappear whole, and checksums of what is in them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{Error, Result, atomic, digest, recipe::Damage};

const SUMS: &str = "SHA256SUMS";
/// Of folders that are being written or removed.
const PARTIAL: &str = "partial";

/// The name of a folder while it is being written or removed.
pub(super) fn partial(path: &Path) -> PathBuf {
    path.with_extension(PARTIAL)
}

/// Removes a checkpoint so that no half of it is ever seen under its name. One that is not there is fine.
pub(super) fn retire(path: &Path) -> Result<()> {
    if path.exists() {
        let aside = path.with_extension(format!("old.{PARTIAL}"));
        fs::rename(path, &aside).map_err(Error::io("rename", path))?;
        fs::remove_dir_all(&aside).map_err(Error::io("remove", &aside))?;
    }
    Ok(())
}

/// Removes what a run that was killed left half-written or half-removed.
pub(super) fn remove_leftovers(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.extension().is_some_and(|extension| extension == PARTIAL) && path.is_dir() {
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Flushes the names in a folder to the disk, where the system lets a folder be opened.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("write", path))?;
    }
    Ok(())
}

/// Writes the checksums of these files, as `sha256sum` does, and flushes the folder.
pub(super) fn write_sums(folder: &Path, names: [&str; 3]) -> Result<()> {
    let mut text = String::new();
    for name in names {
        let path = folder.join(name);
        let sum = digest::of_file(&path).map_err(Error::io("read", &path))?;
        text += &format!("{sum}  {name}\n");
    }
    atomic::write(&folder.join(SUMS), text.as_bytes())?;
    sync_folder(folder)
}

/// Whether these files are there and are what was written.
pub(super) fn verify(folder: &Path, names: [&str; 3]) -> Result<(), Damage> {
    let damage = |name: &str, reason: String| Damage { path: folder.join(name), reason };
    let unreadable = |name: &str, error: io::Error| damage(name, format!("cannot be read: {error}"));
    let sums = fs::read_to_string(folder.join(SUMS)).map_err(|error| unreadable(SUMS, error))?;
    for name in names {
        let recorded = sums.lines().find_map(|line| line.strip_suffix(name)?.strip_suffix("  "));
        let Some(recorded) = recorded else {
            return Err(damage(SUMS, format!("has no checksum of `{name}`")));
        };
        let actual = digest::of_file(&folder.join(name)).map_err(|error| unreadable(name, error))?;
        if actual != recorded {
            return Err(damage(name, format!("is not what was saved: its SHA-256 is not the one in `{SUMS}`")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("a", "abc"), ("b", ""), ("c", "x")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        write_sums(folder.path(), ["a", "b", "c"]).unwrap();
        let text = fs::read_to_string(folder.path().join(SUMS)).unwrap();
        // FIPS 180-2, appendix B.1, and the digest of nothing.
        assert!(text.starts_with("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a\n"), "{text}");
        assert!(text.contains("\ne3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  b\n"), "{text}");
        verify(folder.path(), ["a", "b", "c"]).unwrap();
    }

    #[test]
    fn every_kind_of_damage_is_seen() {
        type Spoil = fn(&Path);
        let cases: [(&str, &str, Spoil); 5] = [
            ("b", "is not what was saved", |folder| fs::write(folder.join("b"), "c").unwrap()),
            ("b", "is not what was saved", |folder| fs::write(folder.join("b"), "").unwrap()),
            ("b", "cannot be read", |folder| fs::remove_file(folder.join("b")).unwrap()),
            (SUMS, "cannot be read", |folder| fs::remove_file(folder.join(SUMS)).unwrap()),
            (SUMS, "has no checksum of `a`", |folder| fs::write(folder.join(SUMS), "").unwrap()),
        ];
        for (name, reason, spoil) in cases {
            let folder = tempfile::tempdir().unwrap();
            let _ = ["a", "b", "c"].map(|name| fs::write(folder.path().join(name), name).unwrap());
            write_sums(folder.path(), ["a", "b", "c"]).unwrap();
            spoil(folder.path());
            let damage = verify(folder.path(), ["a", "b", "c"]).unwrap_err();
            assert_eq!(damage.path, folder.path().join(name));
            assert!(damage.reason.contains(reason), "{damage}");
        }
    }

    #[test]
    fn leftovers_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["step-000001", "step-000002.partial", "step-000003.old.partial"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("file"), "x").unwrap();
        }
        remove_leftovers(folder.path()).unwrap();
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["step-000001"]);
        retire(&folder.path().join("step-000001")).unwrap();
        retire(&folder.path().join("step-000001")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
