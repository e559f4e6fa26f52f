//! NVIDIA's run-time compiler, loaded by path.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    fs,
    path::{Path, PathBuf},
    ptr,
};

use anyhow::{Context, Result, ensure};
use libloading::Library;
use serde::Serialize;

type Program = *mut c_void;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type Create =
    unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const c_void, *const c_void) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type LogSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Log = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
type Fill = unsafe extern "C" fn(*mut c_int) -> c_int;
type CodeSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Code = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The first version that keeps compiled headers.
const PRECOMPILES: (i32, i32) = (12, 8);

/// The library and where its headers are.
pub(crate) struct Nvrtc {
    version: Version,
    create: Create,
    compile: Compile,
    log_size: LogSize,
    log: Log,
    destroy: Destroy,
    count_architectures: Count,
    architectures: Fill,
    code_size: CodeSize,
    code: Code,
    include: Vec<PathBuf>,
    /// Unloaded last: the functions above are its.
    _library: Library,
    /// What NVRTC loads by name at its first use.
    _builtins: Vec<Library>,
}

/// What the assembler says that a kernel needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// Registers of a unit.
    pub(crate) registers: u32,
    /// Bytes that a unit spills, stores and loads counted in the code.
    pub(crate) spill_bytes: u32,
    /// Local memory of a unit: spills, and arrays that are indexed at run time.
    pub(crate) stack_bytes: u32,
    /// Shared memory of fixed size.
    pub(crate) static_shared_bytes: usize,
}

impl Nvrtc {
    /// # Errors
    /// If the library does not load, or lacks a function of NVRTC 12 or later.
    pub(crate) fn load(library: &Path, include: Vec<PathBuf>) -> Result<Self> {
        #[allow(unsafe_code, reason = "loading a library runs its initialisers")]
        // SAFETY: the caller names NVRTC, whose initialisers have no preconditions; nor have those of what lies beside it.
        let load = |path: &Path| unsafe { Library::new(path) }.with_context(|| format!("loading {}", path.display()));
        let loaded = load(library)?;
        #[allow(unsafe_code, reason = "a symbol has the type that its documentation says")]
        fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T> {
            // SAFETY: every `T` below is the prototype of the function of that name in nvrtc.h.
            Ok(*unsafe { library.get::<T>(name.as_bytes()) }.with_context(|| format!("NVRTC has no {name}"))?)
        }
        Ok(Self {
            version: symbol(&loaded, "nvrtcVersion")?,
            create: symbol(&loaded, "nvrtcCreateProgram")?,
            compile: symbol(&loaded, "nvrtcCompileProgram")?,
            log_size: symbol(&loaded, "nvrtcGetProgramLogSize")?,
            log: symbol(&loaded, "nvrtcGetProgramLog")?,
            destroy: symbol(&loaded, "nvrtcDestroyProgram")?,
            count_architectures: symbol(&loaded, "nvrtcGetNumSupportedArchs")?,
            architectures: symbol(&loaded, "nvrtcGetSupportedArchs")?,
            code_size: symbol(&loaded, "nvrtcGetCUBINSize")?,
            code: symbol(&loaded, "nvrtcGetCUBIN")?,
            include,
            _library: loaded,
            _builtins: builtins(library)?.iter().map(|path| load(path)).collect::<Result<_>>()?,
        })
    }

    /// Major and minor version.
    #[allow(unsafe_code, reason = "a call into a C library")]
    pub(crate) fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to live integers.
        unsafe { (self.version)(&mut major, &mut minor) };
        (major, minor)
    }

    /// The compute capabilities that this version compiles for.
    #[allow(unsafe_code, reason = "calls into a C library")]
    pub(crate) fn capabilities(&self) -> Vec<u32> {
        let mut count = 0;
        // SAFETY: the pointer is to a live integer.
        unsafe { (self.count_architectures)(&mut count) };
        let mut all = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: there is room for as many as NVRTC said there are.
        unsafe { (self.architectures)(all.as_mut_ptr()) };
        all.into_iter().filter_map(|one| u32::try_from(one).ok()).collect()
    }

    /// Compiles `source` to machine code of `target`, such as `sm_90a`, with CubeCL's options. The code, and what it uses.
    ///
    /// # Errors
    /// With NVRTC's log if it does not compile.
    pub(crate) fn compile(&self, source: &str, target: &str) -> Result<(Vec<u8>, Usage)> {
        let mut options = vec![
            format!("--gpu-architecture={target}"),
            "-lineinfo".to_owned(),
            // Registers, stack and spills go to the log.
            "--ptxas-options=-v".to_owned(),
        ];
        // Headers are compiled once for all kernels that begin with the same ones.
        if self.version() >= PRECOMPILES {
            options.push("--pch".to_owned());
        }
        options.extend(self.include.iter().map(|folder| format!("--include-path={}", folder.display())));
        let (code, log) = self.run(source, &options)?;
        let code = code.with_context(|| format!("NVRTC refuses it:\n{log}"))?;
        let usage = read_log(&log)
            .with_context(|| format!("NVRTC {:?} does not say what the kernel uses:\n{log}", self.version()))?;
        Ok((code, usage))
    }

    #[allow(unsafe_code, reason = "calls into a C library")]
    fn run(&self, source: &str, options: &[String]) -> Result<(Option<Vec<u8>>, String)> {
        let source = CString::new(source)?;
        let options = options.iter().map(|option| CString::new(option.as_str())).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program: Program = ptr::null_mut();
        // SAFETY: `source` is a string that ends in 0; no headers are given, so their lists may be null.
        let created = unsafe { (self.create)(&mut program, source.as_ptr(), ptr::null(), 0, ptr::null(), ptr::null()) };
        ensure!(created == 0, "nvrtcCreateProgram: error {created}");
        // SAFETY: `program` was created above; `options` holds that many strings, which outlive the call.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let mut len = 0;
        // SAFETY: `program` is live, `len` a live integer.
        let sized = unsafe { (self.log_size)(program, &mut len) };
        let mut log = vec![0u8; len + 1];
        if sized == 0 {
            // SAFETY: `log` has room for the `len` bytes that NVRTC said it writes.
            unsafe { (self.log)(program, log.as_mut_ptr().cast()) };
        }
        let mut code_len = 0;
        let mut code = Vec::new();
        // SAFETY: `program` is live, `code_len` a live integer.
        if compiled == 0 && unsafe { (self.code_size)(program, &mut code_len) } == 0 {
            code = vec![0; code_len];
            // SAFETY: `code` has room for the `code_len` bytes that NVRTC said it writes.
            unsafe { (self.code)(program, code.as_mut_ptr().cast()) };
        }
        // SAFETY: `program` is live and not used again.
        unsafe { (self.destroy)(&mut program) };
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
        Ok(((compiled == 0).then_some(code), log))
    }
}

/// NVRTC's builtins beside it. Some versions look for them only where the system looks for libraries: not in Python's packages. One
/// that is loaded is found.
fn builtins(library: &Path) -> Result<Vec<PathBuf>> {
    let folder = library.parent().context("a library without a folder")?;
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let is_builtins = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so"))
    };
    paths.retain(is_builtins);
    Ok(paths)
}

/// Reads what `ptxas -v` prints.
fn read_log(log: &str) -> Option<Usage> {
    let mut usage = Usage::default();
    let mut found = false;
    for line in log.lines() {
        let fields: Vec<&str> = line.split([',', ':']).map(str::trim).collect();
        let number = |suffix: &str| {
            // The first field follows the severity, as in `ptxas   .   784 bytes stack frame`.
            let field = fields.iter().find_map(|field| field.strip_suffix(suffix))?;
            field.split_whitespace().last()?.parse::<u32>().ok()
        };
        usage.registers = usage.registers.max(number(" registers").unwrap_or(0));
        usage.stack_bytes = usage.stack_bytes.max(number(" bytes stack frame").unwrap_or(0));
        usage.stack_bytes = usage.stack_bytes.max(number(" bytes cumulative stack size").unwrap_or(0));
        usage.spill_bytes += number(" bytes spill stores").unwrap_or(0) + number(" bytes spill loads").unwrap_or(0);
        usage.static_shared_bytes = usage.static_shared_bytes.max(number(" bytes smem").unwrap_or(0) as usize);
        found |= number(" registers").is_some();
    }
    found.then_some(usage)
}

#[cfg(test)]
mod tests {
    use super::{Usage, read_log};

    #[test]
    fn reads_the_assembler_s_words() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'k' for 'sm_80'\n\
            ptxas info    : Function properties for k\n\
            ptxas         .     784 bytes stack frame, 408 bytes spill stores, 488 bytes spill loads\n\
            ptxas info    : Used 64 registers, used 1 barriers, 784 bytes cumulative stack size, 512 bytes smem, 372 bytes cmem[0]\n\
            ptxas info    : Compile time = 154.281 ms\n";
        let expected = Usage { registers: 64, spill_bytes: 408 + 488, stack_bytes: 784, static_shared_bytes: 512 };
        assert_eq!(read_log(log), Some(expected));
        assert_eq!(read_log("warning: something else\n"), None);
    }
}
