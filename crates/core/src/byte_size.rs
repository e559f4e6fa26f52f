//! Numbers of bytes as people write and read them.

use std::{fmt, str::FromStr};

use crate::Error;

/// A number of bytes, written as `12GiB`, `1.5GB`, `800 MiB` or plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Binary and decimal units, by their names in lower case.
const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

impl FromStr for ByteSize {
    type Err = Error;

    /// # Errors
    /// [`Error::InvalidSpec`] for anything else, and for 2^53 bytes or more.
    fn from_str(text: &str) -> Result<Self, Error> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim().to_ascii_lowercase();
        let factor = UNITS.into_iter().find(|(name, _)| *name == unit).map(|(_, factor)| factor as f64);
        let bytes = number.parse::<f64>().ok().zip(factor).map(|(number, factor)| number * factor);
        // Beyond 2^53 a float skips whole bytes; no machine has that many.
        match bytes.filter(|&bytes| bytes < (1u64 << 53) as f64) {
            Some(bytes) => Ok(Self(bytes as u64)),
            None => Err(Error::InvalidSpec {
                op: "memory",
                field: "bytes",
                value: format!("`{text}`"),
                rule: "a number of bytes, such as 12GiB or 800MB",
            }),
        }
    }
}

/// In the binary unit that fits.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scaled = |unit: u32| self.0 as f64 / f64::from(1u32 << unit);
        let text = match self.0 {
            0..0x400 => format!("{} B", self.0),
            0x400..0x10_0000 => format!("{:.1} KiB", scaled(10)),
            0x10_0000..0x4000_0000 => format!("{:.1} MiB", scaled(20)),
            _ => format!("{:.2} GiB", scaled(30)),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::ByteSize;

    #[test]
    fn sizes_in_binary_and_decimal_units() {
        for (text, bytes) in
            [("12GiB", 12 << 30), ("1.5kb", 1500), ("800 MiB", 800 << 20), ("7", 7), ("7B", 7), ("0", 0)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1.2.3", "12 apples", "1e9", "9999999TiB"] {
            let message = text.parse::<ByteSize>().unwrap_err().to_string();
            assert!(message.contains("such as 12GiB"), "{message}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        let shown = [0, 1023, 1024, 1 << 20, (1 << 30) - 1, 5 << 29].map(|bytes| ByteSize(bytes).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1024.0 MiB", "2.50 GiB"]);
        assert_eq!(format!("{:>9}|", ByteSize(1024)), "  1.0 KiB|");
    }
}
