//! The kernels that the source declares, to hold the calls to launching every one of them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// Name of a kernel as `norm::rows::forward_kernel`, from the type that CubeCL's macro makes for it:
/// `unsloth_norm::rows::forward_kernel::ForwardKernel<..>`.
pub(crate) fn name_of(type_name: &str) -> String {
    let path = type_name.split('<').next().unwrap_or(type_name);
    let path = path.rsplit_once("::").map_or(path, |(module, _)| module);
    path.strip_prefix("unsloth_").unwrap_or(path).to_owned()
}

/// Whether a kernel of this name is written for tensor cores: one in a module for them, or the library's, of which only such a one takes part.
pub(crate) fn is_for_tensor_cores(name: &str) -> bool {
    name.split("::").any(|module| module == "tensor") || name.starts_with("cubek_matmul::")
}

/// Launched on no device of NVIDIA's: where planes of 32 units shuffle, another kernel takes its place.
const ELSEWHERE: &str = "attention::decode::shared::part_kernel";

/// Names, as [`name_of`] gives them, of all functions under `crates/kernels` that can be launched on NVIDIA's devices.
///
/// # Errors
/// If a file cannot be read, or [`ELSEWHERE`] is not there.
pub(crate) fn declared(root: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for family in folder(&root.join("crates/kernels"))? {
        let name = family.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
        read_modules(&family.join("src"), &name, &mut names)?;
    }
    ensure!(names.remove(ELSEWHERE), "{ELSEWHERE}: no such kernel");
    Ok(names)
}

fn folder(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(path).with_context(|| path.display().to_string())?;
    Ok(entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
}

fn read_modules(path: &Path, module: &str, names: &mut BTreeSet<String>) -> Result<()> {
    for path in folder(path)? {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let module = if ["lib", "mod"].contains(&&*stem) { module.to_owned() } else { format!("{module}::{stem}") };
        if path.is_dir() {
            read_modules(&path, &module, names)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            names.extend(launchable(&text).map(|function| format!("{module}::{function}")));
        }
    }
    Ok(())
}

/// Functions under a `#[cube(launch)]` or `#[cube(launch_unchecked)]`, other attributes between them or not.
fn launchable(text: &str) -> impl Iterator<Item = &str> {
    let mut marked = false;
    text.lines().map(str::trim_start).filter_map(move |line| {
        marked |= line.starts_with("#[cube(launch");
        let (_, rest) = line.split_once("fn ").filter(|_| marked && !line.starts_with(['#', '/']))?;
        marked = false;
        rest.split(['<', '(']).next()
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{declared, is_for_tensor_cores, launchable, name_of};

    #[test]
    fn names_are_the_same_from_type_and_source() {
        let from_type = name_of("unsloth_norm::rows::forward_kernel::ForwardKernel<f32, half::bf16, offline::R>");
        assert_eq!(from_type, "norm::rows::forward_kernel");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        assert!(declared(&root).unwrap().contains(&from_type));
    }

    #[test]
    fn kernels_for_tensor_cores_are_known_by_their_modules() {
        for name in
            ["linear::tensor::tensor_kernel", "attention::tensor::forward::forward_kernel", "cubek_matmul::a::entry"]
        {
            assert!(is_for_tensor_cores(name), "{name}");
        }
        for name in ["linear::product::tiled_kernel", "attention::forward::forward_kernel", "quant::tensors::kernel"] {
            assert!(!is_for_tensor_cores(name), "{name}");
        }
    }

    #[test]
    fn finds_what_can_be_launched() {
        let text = "#[cube]\nfn helper<E: Float>(x: u32) {}\n/// Grid: fn of rows.\n#[cube(launch)]\n#[allow(x)]\n\
            fn one_kernel<E: Float>(\n#[cube(launch_unchecked)]\npub(crate) fn two_kernel(x: u32) {}\nfn host() {}\n";
        assert_eq!(launchable(text).collect::<Vec<_>>(), ["one_kernel", "two_kernel"]);
    }
}
