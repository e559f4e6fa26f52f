//! Generated CUDA C++ as code of the host.

use std::{
    env,
    ffi::{CStr, c_char, c_uint, c_void},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use libloading::Library;

use super::ptx;

/// What the generated code includes; the emulation takes the place of all of them.
const HEADERS: [&str; 4] = ["cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "mma.h"];

type Entry = unsafe extern "C" fn(*const c_uint, *const c_uint, usize, *mut *mut c_void) -> *const c_char;

/// A C++ compiler and a folder of its own.
#[derive(Debug)]
pub(crate) struct Host {
    compiler: String,
    folder: tempfile::TempDir,
}

/// A kernel that the host can run.
#[derive(Debug)]
pub(crate) struct Kernel {
    entry: Entry,
    _library: Library,
}

/// The C++ compiler: `CXX`, else `c++`; `None` if it does not run.
pub(crate) fn compiler() -> Option<String> {
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(&compiler).arg("--version").output();
    output.is_ok_and(|output| output.status.success()).then_some(compiler)
}

impl Host {
    /// # Errors
    /// If there is no compiler, or no folder for temporary files.
    pub(crate) fn new() -> Result<Self> {
        let compiler = compiler().context("no C++ compiler: none in CXX, and no `c++`")?;
        let folder = tempfile::tempdir()?;
        for header in HEADERS {
            fs::write(folder.path().join(header), "")?;
        }
        fs::write(folder.path().join("cuda.hpp"), include_str!("cuda.hpp"))?;
        Ok(Self { compiler, folder })
    }

    /// Compiles the kernel called `entry`; `index` names its files.
    ///
    /// # Errors
    /// If the compiler refuses it.
    pub(crate) fn compile(&self, source: &str, entry: &str, index: usize) -> Result<Kernel> {
        let text = format!(
            "#include \"cuda.hpp\"\n{}\nextern \"C\" __attribute__((visibility(\"default\"))) const char *emulated_entry(const unsigned *grid, const unsigned *block, \
             size_t bytes, void **arguments) {{\n    emulated::arguments = arguments;\n    emulated::body = [] {{ \
             emulated::call({entry}); }};\n    return emulated::launch(grid, block, bytes);\n}}\n",
            ptx::as_calls(source)?
        );
        let path = |extension: &str| self.folder.path().join(format!("{index}.{extension}"));
        let (code, library) = (path("cpp"), path("so"));
        fs::write(&code, text)?;
        self.run(&code, &library)?;
        #[allow(unsafe_code, reason = "loading a library runs its initialisers")]
        // SAFETY: the library was made just now, of code whose static data are initialised by constants and empty vectors.
        let loaded = unsafe { Library::new(&library) }?;
        #[allow(unsafe_code, reason = "a symbol has the type that its definition says")]
        // SAFETY: the definition is in `text` above.
        let entry = *unsafe { loaded.get::<Entry>(b"emulated_entry") }?;
        Ok(Kernel { entry, _library: loaded })
    }

    fn run(&self, code: &Path, library: &PathBuf) -> Result<()> {
        let output = Command::new(&self.compiler)
            // Registers are read as words and as pairs of halves. Names are each library's own.
            .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-fvisibility=hidden"])
            .args(["-U_FORTIFY_SOURCE", "-I"])
            .arg(self.folder.path())
            .arg(code)
            .arg("-o")
            .arg(library)
            .output()
            .with_context(|| self.compiler.clone())?;
        let log = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} refuses the code:\n{log}", self.compiler);
        Ok(())
    }
}

impl Kernel {
    /// Runs the kernel. `arguments` point to what each of its parameters is.
    ///
    /// # Errors
    /// If it does something that is not emulated, or that a card could not do.
    pub(crate) fn launch(
        &self,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        #[allow(unsafe_code, reason = "a call into generated code")]
        // SAFETY: each argument points to a parameter of the kernel's type, which the caller keeps alive; a kernel compares indices with
        // the lengths of its buffers, for CubeCL generated it to be launched checked.
        let problem = unsafe { (self.entry)(grid.as_ptr(), block.as_ptr(), shared_bytes, arguments.as_mut_ptr()) };
        if problem.is_null() {
            return Ok(());
        }
        #[allow(unsafe_code, reason = "a string of C")]
        // SAFETY: not null, so a string of the library's, which ends in 0.
        let problem = unsafe { CStr::from_ptr(problem) };
        bail!("{}", problem.to_string_lossy())
    }
}
