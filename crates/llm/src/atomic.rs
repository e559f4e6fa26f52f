//! Files that are either the old one or the whole new one.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::Serialize;

use crate::{Error, Result};

/// Writes to a temporary file in the same folder, flushes it to the disk and renames it to `path`.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |partial| File::create(partial)?.write_all(bytes))
}

/// Lets `make` write a temporary file in the same folder, flushes it to the disk and renames it to `path`.
pub(crate) fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let written = make(partial).and_then(|()| {
        File::options().write(true).open(partial)?.sync_all()?;
        fs::rename(partial, path)
    });
    written.map_err(|source| {
        // The write has failed already; that the remains cannot be removed either would only hide why.
        let _ = fs::remove_file(partial);
        Error::io("write", path)(source)
    })
}

/// Writes a value as indented JSON, as [`write`] does.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(Error::json(path))?;
    bytes.push(b'\n');
    write(path, &bytes)
}
