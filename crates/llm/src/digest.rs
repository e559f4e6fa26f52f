//! SHA-256 of files and numbers, as `sha256sum` writes it.

use std::{fs::File, io, io::Read, path::Path};

use sha2::{Digest as _, Sha256};

/// A digest under way.
#[derive(Default)]
pub(crate) struct Digest(Sha256);

impl Digest {
    /// Adds numbers, each in eight bytes, the lowest first.
    pub(crate) fn numbers(&mut self, numbers: impl IntoIterator<Item = i64>) {
        let mut block = Vec::with_capacity(BLOCK);
        for number in numbers {
            block.extend(number.to_le_bytes());
            if block.len() >= BLOCK {
                self.0.update(&block);
                block.clear();
            }
        }
        self.0.update(&block);
    }

    /// Adds bytes, their number first, so that what follows is not taken for a part of them.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.numbers([bytes.len() as i64]);
        self.0.update(bytes);
    }

    /// In lower-case hexadecimal digits.
    pub(crate) fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

const BLOCK: usize = 1 << 16;

/// Digest of what a file holds.
pub(crate) fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let (mut digest, mut block) = (Digest::default(), vec![0; BLOCK]);
    loop {
        match file.read(&mut block)? {
            0 => return Ok(digest.finish()),
            count => digest.0.update(&block[..count]),
        }
    }
}
