//! Options that several commands share.

use std::{fmt, path::PathBuf, str::FromStr};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use unsloth_rs::{
    DType, Device,
    cpu::{CpuBackend, CpuOptions},
    device,
    llm::dataset::Report,
};

/// Where to compute.
#[derive(Args)]
pub(crate) struct DeviceArgs {
    /// Device to compute on: cpu, vulkan:N, wgpu or cuda:N; `unsloth devices` lists those of this build and machine [default: cpu]
    #[arg(long, value_name = "NAME")]
    pub(crate) device: Option<String>,
    /// Threads of the CPU [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl DeviceArgs {
    pub(crate) fn open(&self) -> Result<Device> {
        match (self.device.as_deref().unwrap_or("cpu"), self.threads) {
            ("cpu", Some(_)) => {
                let options = CpuOptions { num_threads: self.threads, ..CpuOptions::default() };
                Ok(Device::new(CpuBackend::new(options)?))
            }
            (name, Some(_)) => bail!("--threads is for --device cpu, not {name}"),
            (name, None) => Ok(device(name)?),
        }
    }
}

/// Which model, in which arithmetic.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Folder of the model: config.json and safetensors, as Hugging Face has them; with feature `hub` also its name there
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Type of activations
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub(crate) dtype: FloatType,
}

/// A storage type, as the command line spells it.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum FloatType {
    F32,
    Bf16,
    F16,
}

impl From<FloatType> for DType {
    fn from(dtype: FloatType) -> Self {
        match dtype {
            FloatType::F32 => DType::F32,
            FloatType::Bf16 => DType::BF16,
            FloatType::F16 => DType::F16,
        }
    }
}

/// A number of bytes, as the command line spells it: `12GiB`, `1.5GB`, `800 MiB` or plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteSize(pub(crate) u64);

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
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = || "expected a number of bytes, such as 12GiB or 800MB".to_owned();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: f64 = number.parse().map_err(|_| rule())?;
        let unit = unit.trim().to_ascii_lowercase();
        let (_, factor) = UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(rule)?;
        let bytes = number * factor as f64;
        // Beyond 2^53 a float skips whole bytes; no machine has that many.
        if bytes < (1u64 << 53) as f64 { Ok(Self(bytes as u64)) } else { Err(rule()) }
    }
}

/// Bytes as people read them.
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

/// One line about what was read; `name` says what for.
pub(crate) fn describe(name: &str, data: &Report) -> String {
    let mut line = format!(
        "{name}: {} examples, {} tokens, {:.1}% of them targets",
        data.num_examples,
        data.num_tokens,
        100.0 * data.target_share()
    );
    if data.num_truncated > 0 {
        line += &format!("; {} examples cut to the limit", data.num_truncated);
    }
    if data.num_dropped > 0 {
        line += &format!("; {} examples without a target dropped", data.num_dropped);
    }
    line
}

/// A text as a shell takes it.
pub(crate) fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteSize, quoted};

    #[test]
    fn texts_are_quoted_where_a_shell_would_take_them_apart() {
        let cases = [
            ("out/a-1.toml", "out/a-1.toml"),
            ("my out/c", "'my out/c'"),
            ("it's", r"'it'\''s'"),
            ("$x", "'$x'"),
            ("\"Hi!\"", "'\"Hi!\"'"),
            ("", "''"),
        ];
        for (text, expected) in cases {
            assert_eq!(quoted(text), expected);
        }
    }

    #[test]
    fn sizes_in_binary_and_decimal_units() {
        for (text, bytes) in
            [("12GiB", 12 << 30), ("1.5kb", 1500), ("800 MiB", 800 << 20), ("7", 7), ("7B", 7), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "1.2.3", "12 apples", "1e9", "9999999TiB"] {
            assert!(text.parse::<ByteSize>().unwrap_err().contains("such as 12GiB"), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        let shown = [0, 1023, 1024, 1 << 20, (1 << 30) - 1, 5 << 29].map(|bytes| ByteSize(bytes).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1024.0 MiB", "2.50 GiB"]);
        assert_eq!(format!("{:>9}|", ByteSize(1024)), "  1.0 KiB|");
    }
}
