//! A data file as the JSON texts of its examples.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use crate::{Error, Result};

/// What a Parquet file begins with, and no JSON text does.
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// Calls `each` with the number, from 1, and the JSON text of every line that is not blank, or of every row of a Parquet file.
pub(super) fn read(path: &Path, each: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    if file.fill_buf().map_err(Error::io("read", path))?.starts_with(PARQUET_MAGIC) {
        #[cfg(feature = "parquet")]
        return super::parquet::read(path, file.into_inner(), each);
        #[cfg(not(feature = "parquet"))]
        return Err(Error::ParquetNotBuilt { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    let mut line = 0;
    loop {
        bytes.clear();
        if file.read_until(b'\n', &mut bytes).map_err(Error::io("read", path))? == 0 {
            return Ok(());
        }
        line += 1;
        // Editors of some systems begin a file with a byte order mark, which JSON does not have.
        let text = if line == 1 { bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes) } else { &bytes };
        let text = text.trim_ascii_end();
        if !text.is_empty() {
            each(line, text)?;
        }
    }
}
