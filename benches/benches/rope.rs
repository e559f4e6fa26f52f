//! `rope`: see `cases::rope`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("rope")
}
