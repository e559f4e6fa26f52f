//! Machine code as text, by NVIDIA's `nvdisasm`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// The instruction of tensor cores that `mma.sync` is compiled to.
const TENSOR_CORES: &str = "HMMA";

/// `nvdisasm`, and a folder for what it reads.
#[derive(Debug)]
pub(crate) struct Disassembler {
    pub(crate) program: PathBuf,
    pub(crate) folder: PathBuf,
}

impl Disassembler {
    /// Instructions of tensor cores in `code`; `name` names its file.
    ///
    /// # Errors
    /// If the program does not run or does not read the code.
    pub(crate) fn tensor_core_instructions(&self, code: &[u8], name: &str) -> Result<usize> {
        let path = self.folder.join(name);
        fs::write(&path, code).with_context(|| path.display().to_string())?;
        let text = self.text(&path)?;
        fs::remove_file(&path)?;
        Ok(count(&text))
    }

    fn text(&self, path: &Path) -> Result<String> {
        let output = Command::new(&self.program).arg("--print-code").arg(path).output();
        let output = output.with_context(|| self.program.display().to_string())?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {log}", self.program.display());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn count(text: &str) -> usize {
    text.lines().filter(|line| line.split_whitespace().any(|word| word.starts_with(TENSOR_CORES))).count()
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts_instructions() {
        let text = "        /*0010*/   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;\n        /*0020*/  @P0 HMMA.16816.F32 R4, R4, R8, RZ ;\n\
            .L_x_HMMA:\n        /*0030*/   FFMA R1, R2, R3, R4 ;\n";
        assert_eq!(super::count(text), 2);
    }
}
