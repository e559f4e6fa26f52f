//! `cargo xtask cuda-check`: every CUDA kernel compiled without a GPU. This part finds NVRTC; `xtask/cuda-check` does the rest, in a
//! program of its own, so that other tasks need not build CubeCL.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::cargo;

/// Where to look, and for what.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Folder with NVRTC and CUDA's headers: a CUDA toolkit, or Python's site-packages.
    #[arg(long, value_name = "DIR")]
    nvrtc: Option<PathBuf>,
    /// Python whose packages hold NVRTC and CUDA's headers [default: the active one].
    #[arg(long, value_name = "PATH", conflicts_with = "nvrtc")]
    python: Option<PathBuf>,
    /// Where there is no NVRTC, get the one that docs/cuda-kernels.md was made with: NVIDIA's wheels, by pip, into target/nvrtc.
    #[arg(long, conflicts_with_all = ["nvrtc", "python"])]
    install: bool,
    /// NVIDIA's disassembler [default: the one beside NVRTC, else in PATH].
    #[arg(long, value_name = "PATH")]
    nvdisasm: Option<PathBuf>,
    /// Where the report goes.
    #[arg(long, value_name = "PATH", default_value = "target/cuda-check.json")]
    json: String,
    /// Where the generated CUDA C++ goes, one file per instantiation and architecture.
    #[arg(long, value_name = "DIR")]
    sources: Option<PathBuf>,
    /// Write docs/cuda-kernels.md, which is otherwise compared.
    #[arg(long, conflicts_with = "filter")]
    write: bool,
    /// Only operators whose name contains this.
    #[arg(default_value = "")]
    filter: String,
}

/// NVRTC and the folders of the headers that kernels include.
#[derive(Debug, PartialEq, Eq)]
struct Toolkit {
    library: PathBuf,
    include: Vec<PathBuf>,
    nvdisasm: Option<PathBuf>,
}

pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let folders = folders(root, arguments);
    let found = || folders.iter().find_map(|folder| Toolkit::below(folder));
    let mut reason = "no NVRTC with CUDA headers in CUDA_PATH, /usr/local/cuda, /opt/cuda, /usr, LD_LIBRARY_PATH, Python's packages or \
                      target/nvrtc; to get it by pip: cargo xtask cuda-check --install"
        .to_owned();
    let mut toolkit = found();
    if toolkit.is_none() && arguments.install {
        match install(root) {
            Ok(()) => toolkit = found(),
            Err(why) => reason = why,
        }
    }
    let Some(toolkit) = toolkit else {
        let asked = arguments.nvrtc.is_some() || arguments.python.is_some();
        ensure!(!asked, "no NVRTC with CUDA headers in {folders:?}");
        println!("cuda-check: not run ({reason})");
        return Ok(());
    };
    println!("NVRTC: {}", toolkit.library.display());
    let library = toolkit.library.display().to_string();
    let include: Vec<String> = toolkit.include.iter().map(|folder| folder.display().to_string()).collect();
    let mut options = vec!["--nvrtc", &library];
    for folder in &include {
        options.extend(["--include", folder]);
    }
    let sources = arguments.sources.as_ref().map(|folder| folder.display().to_string());
    if let Some(folder) = &sources {
        options.extend(["--sources", folder]);
    }
    let nvdisasm = arguments.nvdisasm.clone().or(toolkit.nvdisasm).or_else(in_path);
    let nvdisasm = nvdisasm.map(|program| program.display().to_string());
    if let Some(program) = &nvdisasm {
        options.extend(["--nvdisasm", program]);
    }
    if arguments.write {
        options.push("--write");
    }
    options.extend(["--json", &arguments.json, &arguments.filter]);
    let program = cargo::build(root, ("bin", "cuda-check"))?;
    println!("$ {} {}", program.display(), options.join(" "));
    let status = Command::new(&program).current_dir(root).args(options).status().context("starting cuda-check")?;
    ensure!(status.success(), "cuda-check: {status}");
    Ok(())
}

/// NVIDIA's wheels of the compiler that docs/cuda-kernels.md was made with, of the headers that kernels include, and of the disassembler.
const WHEELS: [&str; 5] = [
    "nvidia-cuda-nvrtc==13.5.37",
    "nvidia-cuda-runtime==13.5.37",
    "nvidia-cuda-cccl==13.3.5.0.6",
    "nvidia-cuda-crt==13.5.37",
    "nvidia-cuda-nvdisasm==13.5.37",
];

/// Gets the wheels where Python and a package index are at hand.
fn install(root: &Path) -> Result<(), String> {
    let folder = wheels(root).display().to_string();
    let arguments = [&["-m", "pip", "install", "--quiet", "--no-deps", "--target", &folder][..], &WHEELS].concat();
    println!("$ python3 {}", arguments.join(" "));
    match Command::new("python3").args(&arguments).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("python3 -m pip install: {status}")),
        Err(error) => Err(format!("python3: {error}")),
    }
}

fn wheels(root: &Path) -> PathBuf {
    root.join("target/nvrtc")
}

/// The disassembler, if it is installed as a program.
fn in_path() -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(NVDISASM)).find(|path| path.is_file())
}

const NVDISASM: &str = "nvdisasm";

/// Folders that may hold a toolkit, the likeliest first.
fn folders(root: &Path, arguments: &Arguments) -> Vec<PathBuf> {
    if let Some(folder) = &arguments.nvrtc {
        return vec![folder.clone()];
    }
    if let Some(python) = &arguments.python {
        return python_packages(python);
    }
    let mut folders: Vec<PathBuf> = env::var_os("CUDA_PATH").map(PathBuf::from).into_iter().collect();
    // Before what a machine happens to have, since registers and spills differ from one compiler to the next.
    folders.push(wheels(root));
    folders.extend(["/usr/local/cuda", "/opt/cuda", "/usr"].map(PathBuf::from));
    let libraries = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    folders.extend(env::split_paths(&libraries).filter_map(|path| Some(path.parent()?.to_path_buf())));
    let active = env::var_os("VIRTUAL_ENV").map(|folder| Path::new(&folder).join("bin/python3"));
    folders.extend(python_packages(active.as_deref().unwrap_or(Path::new("python3"))));
    folders
}

/// The folders that a Python imports from; none where it does not run.
fn python_packages(python: &Path) -> Vec<PathBuf> {
    let output = Command::new(python).args(["-c", "import sys; print('\\n'.join(sys.path))"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().filter(|line| !line.is_empty()).map(PathBuf::from).collect()
}

impl Toolkit {
    /// The toolkit in `folder`, laid out as NVIDIA's installers, a distribution's packages or Python's wheels do.
    fn below(folder: &Path) -> Option<Self> {
        let wheels = children(&folder.join("nvidia"));
        let targets = children(&folder.join("targets"));
        let roots: Vec<PathBuf> = [folder.to_path_buf()].into_iter().chain(wheels).chain(targets).collect();
        let libraries = roots.iter().flat_map(|root| [root.join("lib64"), root.join("lib")]);
        // Debian's multiarch folder is one deeper.
        let libraries = libraries.flat_map(|lib| [vec![lib.clone()], children(&lib)].concat());
        let library = libraries.flat_map(|lib| children(&lib)).find(|path| is_nvrtc(path))?;
        // Triton's wheel has `crt/mma.h`, which NVIDIA's wheel of the headers lacks; last, for its other headers may be older.
        let include =
            roots.iter().map(|root| root.join("include")).chain([folder.join("triton/backends/nvidia/include")]);
        let include: Vec<PathBuf> = include.flat_map(|include| [include.join("cccl"), include]).collect();
        let holds = |header: &str| include.iter().any(|folder| folder.join(header).is_file());
        if !holds("cuda_runtime.h") || !holds("cuda_fp16.h") {
            return None;
        }
        let useful = |folder: &PathBuf| {
            ["cuda_runtime.h", "crt/mma.h", "cuda/std/version"].iter().any(|header| folder.join(header).is_file())
        };
        let nvdisasm = roots.iter().map(|root| root.join("bin").join(NVDISASM)).find(|path| path.is_file());
        Some(Self { library, include: include.into_iter().filter(useful).collect(), nvdisasm })
    }
}

/// What a folder holds, sorted; nothing where there is none.
fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn is_nvrtc(path: &Path) -> bool {
    // Beside the library lie its builtins and, in newer toolkits, a variant with another allocator.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("libnvrtc.so") && !name.contains("alt")
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::Toolkit;
    use crate::check::plant;

    fn found(files: &[&str]) -> Option<(String, Vec<String>)> {
        let files: Vec<(&str, &str)> = files.iter().map(|&file| (file, "")).collect();
        let folder = plant(&files);
        let shown = |path: PathBuf| path.strip_prefix(folder.path()).unwrap_or(Path::new("")).display().to_string();
        let Toolkit { library, include, .. } = Toolkit::below(folder.path())?;
        Some((shown(library), include.into_iter().map(shown).collect()))
    }

    #[test]
    fn finds_an_installed_toolkit() {
        let files = [
            "lib64/libnvrtc-builtins.so.13.0",
            "lib64/libnvrtc.alt.so.13",
            "lib64/libnvrtc.so.13",
            "include/cuda_runtime.h",
            "include/cuda_fp16.h",
            "include/cccl/cuda/std/version",
        ];
        let include = ["include/cccl", "include"].map(str::to_owned).to_vec();
        assert_eq!(found(&files), Some(("lib64/libnvrtc.so.13".to_owned(), include)));
    }

    #[test]
    fn finds_wheels() {
        let files = [
            "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "nvidia/cuda_runtime/include/cuda_runtime.h",
            "nvidia/cuda_runtime/include/cuda_fp16.h",
            "triton/backends/nvidia/include/crt/mma.h",
        ];
        let include = ["nvidia/cuda_runtime/include", "triton/backends/nvidia/include"].map(str::to_owned).to_vec();
        assert_eq!(found(&files), Some(("nvidia/cuda_nvrtc/lib/libnvrtc.so.12".to_owned(), include)));
    }

    #[test]
    fn a_library_without_headers_is_of_no_use() {
        assert_eq!(found(&["lib/x86_64-linux-gnu/libnvrtc.so.12"]), None);
        let with_headers = ["lib/x86_64-linux-gnu/libnvrtc.so.12", "include/cuda_runtime.h", "include/cuda_fp16.h"];
        assert!(found(&with_headers).is_some());
    }
}
