//! A Vulkan device for the suites: the machine's own, else Mesa's software driver (lavapipe), installed where that is possible.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::cargo;

/// The feature that builds the suites, and the program with the devices that they run on.
pub(crate) const FEATURE: &str = "unsloth-cli/wgpu";

/// Older drivers are passed over where this one can be had: see crates/cube/tests/drivers.rs.
const MESA_MAJOR: u32 = 25;
const PACKAGES: [&str; 2] = ["mesa-vulkan-drivers", "libvulkan1"];

/// What the suites can run on.
pub(crate) enum Vulkan {
    /// One line per device, as the library lists them.
    Devices(Vec<String>),
    /// Why there is none, and what would help.
    Missing(String),
}

/// The Vulkan devices of this machine, after installing a driver if there was none.
///
/// # Errors
/// If the program that lists devices does not build.
pub(crate) fn find_or_install(root: &Path) -> Result<Vulkan> {
    let has_driver = has_driver();
    let mut devices = if has_driver { devices(root)? } else { Vec::new() };
    if devices.is_empty() {
        println!("no Vulkan {}", if has_driver { "device" } else { "driver" });
        if let Err(reason) = install() {
            let help = format!("as root on Debian or Ubuntu: apt-get install {}", PACKAGES.join(" "));
            return Ok(Vulkan::Missing(format!("{reason}; {help}")));
        }
        devices = self::devices(root)?;
    }
    if devices.is_empty() {
        return Ok(Vulkan::Missing("the installed drivers find no device".to_owned()));
    }
    Ok(Vulkan::Devices(devices))
}

impl std::fmt::Display for Vulkan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Devices(devices) => write!(f, "vulkan suites: ran, where {}", devices.join(" and ")),
            Self::Missing(reason) => write!(f, "vulkan suites: not run ({reason})"),
        }
    }
}

/// Whether a loader and the description of a driver are there: without them, listing devices need not be built.
fn has_driver() -> bool {
    let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].iter().any(|name| env::var_os(name).is_some());
    let described = ["/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let libraries = ["/usr/lib", "/usr/lib64", "/usr/local/lib"].map(PathBuf::from);
    // A multiarch folder is one deeper.
    let libraries = libraries.into_iter().flat_map(|folder| [entries(&folder), vec![folder]].concat());
    (named || described.iter().any(|folder| !entries(Path::new(folder)).is_empty()))
        && libraries.into_iter().any(|folder| folder.join("libvulkan.so.1").exists())
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// What the library finds: lines such as `vulkan:0 is llvmpipe (..)`.
fn devices(root: &Path) -> Result<Vec<String>> {
    let program = cargo::build(root, ("example", "devices"))?;
    // A driver may fail in any way that C code can: then it has no devices.
    let listed = Command::new(&program).output().with_context(|| program.display().to_string())?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(listed.lines().map(str::to_owned).collect())
}

/// Installs Mesa's drivers, the newest that the distribution has.
fn install() -> Result<(), String> {
    if !Path::new("/usr/bin/apt-get").exists() {
        return Err("no apt here to install one with".to_owned());
    }
    if stdout("id", &["-u"]).trim() != "0" {
        return Err("installing one takes root".to_owned());
    }
    update();
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if candidate(&stdout("apt-cache", &["policy", PACKAGES[0]])).is_none_or(|major| major < MESA_MAJOR)
        && field(&release, "ID") == Some("debian")
        && let Some(codename) = field(&release, "VERSION_CODENAME")
        && install_from_backports(codename).is_ok()
    {
        return Ok(());
    }
    apt(&[&["install", "-y", "--no-install-recommends"], &PACKAGES[..]].concat())
}

fn install_from_backports(codename: &str) -> Result<(), String> {
    let suite = format!("{codename}-backports");
    let path = PathBuf::from(format!("/etc/apt/sources.list.d/{suite}.sources"));
    let sources: Vec<String> =
        [vec![PathBuf::from("/etc/apt/sources.list")], entries(Path::new("/etc/apt/sources.list.d"))]
            .concat()
            .iter()
            .filter_map(|path| fs::read_to_string(path).ok())
            .collect();
    let known = sources.iter().any(|text| text.lines().any(|line| !line.starts_with('#') && line.contains(&suite)));
    if !known {
        let source = sources.iter().find_map(|text| with_suite(text, codename, &suite));
        let source = source.ok_or_else(|| format!("no source of {codename} among apt's"))?;
        fs::write(&path, source).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    update();
    let installed = apt(&[&["install", "-y", "--no-install-recommends", "-t", &suite], &PACKAGES[..]].concat());
    if installed.is_err() && !known {
        // A mirror without the suite would fail every later update.
        let _ = fs::remove_file(&path);
    }
    installed
}

/// Brings apt's lists up to date. A source that fails need not be the one that matters: the install that follows decides.
fn update() {
    if let Err(reason) = apt(&["update"]) {
        println!("{reason}");
    }
}

fn apt(arguments: &[&str]) -> Result<(), String> {
    println!("$ apt-get {}", arguments.join(" "));
    let quiet = ["-qq", "-o", "Dpkg::Use-Pty=0"];
    let status = Command::new("apt-get").args(quiet).args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("apt-get {}: {status}", arguments[0])),
        Err(error) => Err(format!("apt-get: {error}")),
    }
}

fn stdout(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).env("LC_ALL", "C").output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Value of `name=value` or `name="value"`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim().trim_matches('"'))
}

/// Major version that apt would install, from `apt-cache policy`.
fn candidate(policy: &str) -> Option<u32> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    version.split(['.', '-']).next()?.parse().ok()
}

/// A source of `suite`, on the mirror that `text` (either of apt's formats) gives for `codename`.
fn with_suite(text: &str, codename: &str, suite: &str) -> Option<String> {
    let stanzas = text.split("\n\n").filter_map(|stanza| {
        let value = |name: &str| {
            let line = stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().to_owned())
        };
        let is_it = value("Suites")?.split_whitespace().any(|word| word == codename);
        let binary = value("Types")?.split_whitespace().any(|word| word == "deb");
        (is_it && binary).then(|| (value("URIs"), value("Signed-By")))
    });
    let lines = text.lines().filter_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        // Options in brackets come first, when there are any.
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, its_suite) = (words.next()?, words.next()?);
        let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        (its_suite == codename).then(|| (Some(uri.to_owned()), signed_by.map(str::to_owned)))
    });
    let (uri, signed_by) = stanzas.chain(lines).next()?;
    let signed_by = signed_by.map_or_else(String::new, |key| format!("Signed-By: {key}\n"));
    Some(format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n{signed_by}", uri?))
}

#[cfg(test)]
mod tests {
    use super::{candidate, field, with_suite};

    const EXPECTED: &str = "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm-backports\nComponents: main\n\
        Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";

    #[test]
    fn a_source_beside_one_in_stanzas() {
        let text = "Types: deb\nURIs: http://mirror.test/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
            Types: deb\n# a comment\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
            Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";
        assert_eq!(with_suite(text, "bookworm", "bookworm-backports").as_deref(), Some(EXPECTED));
        assert_eq!(with_suite(text, "trixie", "trixie-backports"), None);
    }

    #[test]
    fn a_source_beside_one_in_lines() {
        let text = "# deb http://old.test/debian bookworm main\n\
            deb-src http://mirror.test/debian bookworm main\n\
            deb http://mirror.test/debian-security bookworm-security main\n\
            deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.test/debian bookworm main\n";
        assert_eq!(with_suite(text, "bookworm", "bookworm-backports").as_deref(), Some(EXPECTED));
        let plain = with_suite("deb http://mirror.test/debian bookworm main\n", "bookworm", "bookworm-backports");
        assert_eq!(plain.as_deref(), EXPECTED.split_inclusive('\n').take(4).collect::<String>().as_str().into());
    }

    #[test]
    fn reads_what_apt_and_the_release_say() {
        let policy = "mesa-vulkan-drivers:\n  Installed: (none)\n  Candidate: 22.3.6-1+deb12u1\n  Version table:\n";
        assert_eq!(candidate(policy), Some(22));
        assert_eq!(candidate("N: Unable to locate package\n"), None);
        let release = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!((field(release, "ID"), field(release, "VERSION_CODENAME")), (Some("debian"), Some("bookworm")));
        assert_eq!(field(release, "VERSION_ID"), Some("12"));
    }
}
