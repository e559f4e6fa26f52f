//! Files that are either the old one or the whole new one.

use std::{fs, fs::File, io::Write, path::Path};

use crate::{Error, Result};

/// Writes to a temporary file in the same folder, flushes it to the disk and renames it to `path`.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let written = File::create(partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(partial, path)
    });
    written.map_err(|source| {
        // The write has failed already; that the remains cannot be removed either would only hide why.
        let _ = fs::remove_file(partial);
        Error::io("write", path)(source)
    })
}
