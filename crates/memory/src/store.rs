//! Tensors that wait outside their device: in host memory or in files.

mod disk;
mod double_buffer;

use std::sync::Arc;

use unsloth_core::{Place, Result, StoreUsage, StoredTensor, Tensor, TensorStore, Transfers};

use self::disk::DiskStore;
pub use self::double_buffer::{Copies, DoubleBuffer};
use crate::{HostBlock, Layout, Ledger, Staging};

/// A store for any device whose memory the host can read and write. Copies to the host are waited for; [`DoubleBuffer`] is the store of
/// a device that goes on computing.
///
/// # Errors
/// [`unsloth_core::Error::Storage`] if no file can be made in the folder of [`Place::Disk`].
pub fn open_store(place: &Place) -> Result<Arc<dyn TensorStore>> {
    match place {
        Place::Host => Ok(Arc::new(HostStore { staging: Staging::new(None) })),
        Place::Disk { folder } => Ok(Arc::new(DiskStore::open(folder)?)),
    }
}

struct HostStore {
    staging: Arc<Staging>,
}

impl TensorStore for HostStore {
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>> {
        let (block, layout) = (self.staging.read(tensor)?, Layout::of(tensor));
        Ok(Box::new(InHostMemory { staging: self.staging.clone(), block, layout }))
    }

    fn usage(&self) -> StoreUsage {
        usage(self.staging.pool().ledger(), self.staging.transfers())
    }
}

fn usage(ledger: &Ledger, [put, taken]: [Transfers; 2]) -> StoreUsage {
    let usage = ledger.usage();
    let (live_bytes, peak_bytes) = (usage.total_live_bytes(), usage.total_peak_bytes());
    StoreUsage { live_bytes, peak_bytes, pinned_peak_bytes: 0, put, taken }
}

struct InHostMemory {
    staging: Arc<Staging>,
    block: HostBlock,
    layout: Layout,
}

impl StoredTensor for InHostMemory {
    fn take(self: Box<Self>) -> Result<Tensor> {
        self.staging.write(&self.block, &self.layout)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use unsloth_core::{Category, DType, Device, Error};

    use super::*;

    const ROW: usize = 64;

    fn tensor(device: &Device, first: f32) -> Tensor {
        let values: Vec<f32> = (0..4 * ROW).map(|i| first + i as f32).collect();
        device.from_slice(&values, [4, ROW], Category::Activations).unwrap()
    }

    fn stores(folder: &Path) -> [Arc<dyn TensorStore>; 2] {
        [Place::Host, Place::Disk { folder: folder.to_owned() }].map(|place| open_store(&place).unwrap())
    }

    #[test]
    fn what_is_taken_is_what_was_put_and_the_device_is_free_meanwhile() {
        let (device, folder) = (unsloth_cpu::device(), tempfile::tempdir().unwrap());
        for store in stores(folder.path()) {
            let originals = [tensor(&device, 0.0), tensor(&device, 0.5)];
            let expected = originals.each_ref().map(|tensor| tensor.to_bytes().unwrap());
            let stored = originals.each_ref().map(|tensor| store.put(tensor).unwrap());
            drop(originals);
            assert_eq!(device.usage().total_live_bytes(), 0);
            assert_eq!(store.usage().live_bytes, 2 * 4 * 4 * ROW as u64);
            let [first, second] = stored;
            let (second, first) = (second.take().unwrap(), first.take().unwrap());
            assert_eq!([&first, &second].map(|tensor| tensor.to_bytes().unwrap()), expected);
            assert_eq!((first.dtype(), *first.shape()), (DType::F32, [4, ROW].into()));
            let usage = store.usage();
            assert_eq!((usage.live_bytes, usage.peak_bytes), (0, 2 * 4 * 4 * ROW as u64));
            for transfers in [usage.put, usage.taken] {
                assert_eq!((transfers.num, transfers.bytes), (2, 2 * 4 * 4 * ROW as u64));
            }
        }
    }

    #[test]
    fn the_folder_is_empty_before_during_and_after() {
        let (device, folder) = (unsloth_cpu::device(), tempfile::tempdir().unwrap());
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        let store = open_store(&Place::Disk { folder: folder.path().to_owned() }).unwrap();
        let stored = store.put(&tensor(&device, 0.0)).unwrap();
        assert_eq!((names(), store.usage().live_bytes), (0, 1024));
        drop(stored);
        assert_eq!((names(), store.usage().live_bytes), (0, 0));
    }

    #[test]
    fn a_folder_that_is_not_there_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap().path().join("nowhere");
        let error = open_store(&Place::Disk { folder }).err().unwrap().to_string();
        assert!(error.starts_with("cannot create a temporary file in `") && error.ends_with("nowhere`"), "{error}");
    }

    #[test]
    fn tensors_go_from_device_to_device() {
        let [from, to] = [unsloth_cpu::device(), unsloth_cpu::device()];
        let staging = Staging::new(None);
        let tensor = tensor(&from, 3.0);
        let copy = staging.copy(&tensor, &to).unwrap();
        assert_eq!((copy.device(), copy.to_bytes().unwrap()), (&to, tensor.to_bytes().unwrap()));
        assert_eq!(staging.transfers().map(|transfers| (transfers.num, transfers.bytes)), [(1, 1024); 2]);
        let small = Layout { shape: [1, ROW].into(), ..Layout::of(&tensor) };
        let block = staging.read(&tensor).unwrap();
        assert!(matches!(staging.write(&block, &small), Err(Error::Length { expected: 256, actual: 1024, .. })));
        drop(block);
        // Every copy used the same buffer.
        assert_eq!(staging.pool().usage().reserved_bytes, 1024);
    }
}
