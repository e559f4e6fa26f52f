//! Failures on device threads.
//!
//! CubeCL runs every launch on a thread of its own per device and swallows what panics there: the caller is told that all went
//! well and reads stale memory. The one global of this crate is a panic hook, chained before the one that was installed, which
//! notes the panics of those threads by thread name.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Mutex, Once, PoisonError},
};

use unsloth_core::{Error, Result};

static FAILURES: Mutex<Option<HashMap<String, String>>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// A panic on a device's thread.
#[derive(Debug, thiserror::Error)]
#[error("the device's thread panicked while running {launched}: {message}")]
pub(crate) struct Panicked {
    /// The operators launched since the device was last known to be well.
    pub(crate) launched: String,
    /// What it said.
    pub(crate) message: String,
}

/// Starts watching. Called once per backend; the hook is installed once per process.
pub(crate) fn watch() {
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            match thread.name() {
                Some(name) if is_device_thread(name) => {
                    let message = info.payload_as_str().unwrap_or("no message").to_owned();
                    let mut failures = FAILURES.lock().unwrap_or_else(PoisonError::into_inner);
                    // The first panic is the cause; later ones follow from it.
                    failures.get_or_insert_default().entry(name.to_owned()).or_insert(message);
                }
                _ => previous(info),
            }
        }));
    });
}

/// What `call` gives; CubeCL panics where a device cannot be opened, and where its thread did.
///
/// # Errors
/// [`Error::Launch`] with what it said.
pub(crate) fn caught<T>(op: &'static str, device: &str, call: impl FnOnce() -> T) -> Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let message = panic.downcast_ref::<String>().cloned();
        let message = message.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        let source = message.unwrap_or_else(|| "no message".to_owned()).into();
        Error::Launch { op, device: device.to_owned(), source }
    })
}

/// CubeCL names its threads `DSD-<type>-<index>` (and `DSU-..` for the stage before).
fn is_device_thread(name: &str) -> bool {
    name.starts_with("DSD-") || name.starts_with("DSU-")
}

/// What the threads of this device said when they panicked, if they did. Once poisoned, a device stays so.
pub(crate) fn failure(device: (u16, u16)) -> Option<String> {
    let failures = FAILURES.lock().unwrap_or_else(PoisonError::into_inner);
    let failures = failures.as_ref()?;
    let names = ["DSD", "DSU"].map(|stage| format!("{stage}-{}-{}", device.0, device.1));
    names.iter().find_map(|name| failures.get(name).cloned())
}
