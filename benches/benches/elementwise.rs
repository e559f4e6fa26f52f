//! `elementwise`: see `cases::elementwise`.

fn main() -> anyhow::Result<()> {
    unsloth_benches::criterion::run("elementwise")
}
