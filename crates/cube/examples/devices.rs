//! Lists the Vulkan devices that the library can use, one per line.

fn main() {
    for adapter in unsloth_cube::adapters() {
        println!("vulkan:{} is {} ({})", adapter.index, adapter.name, adapter.driver);
    }
}
