//! Tensors that wait outside their device: in host memory or in files.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use unsloth_core::{Category, Error, Place, Result, StoreUsage, StoredTensor, Tensor, TensorStore};

use crate::{Charge, HostBlock, Layout, Ledger, Staging};

/// A store for any device whose memory the host can read and write.
///
/// # Errors
/// [`Error::Storage`] if no file can be made in the folder of [`Place::Disk`].
pub fn open_store(place: &Place) -> Result<Arc<dyn TensorStore>> {
    let staging = Staging::new(None);
    match place {
        Place::Host => Ok(Arc::new(HostStore { staging })),
        Place::Disk { folder } => {
            // Found out now rather than in the middle of a step.
            new_file(folder)?;
            Ok(Arc::new(DiskStore { staging, folder: folder.as_path().into(), ledger: Ledger::new("disk", None) }))
        }
    }
}

fn usage(ledger: &Ledger, staging: &Staging) -> StoreUsage {
    let (usage, [put, taken]) = (ledger.usage(), staging.transfers());
    StoreUsage { live_bytes: usage.total_live_bytes(), peak_bytes: usage.total_peak_bytes(), put, taken }
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
        usage(self.staging.pool().ledger(), &self.staging)
    }
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

struct DiskStore {
    /// One tensor at a time passes through it.
    staging: Arc<Staging>,
    folder: Arc<Path>,
    /// Of what is in files.
    ledger: Arc<Ledger>,
}

impl TensorStore for DiskStore {
    fn put(&self, tensor: &Tensor) -> Result<Box<dyn StoredTensor>> {
        let layout = Layout::of(tensor);
        let charge = self.ledger.charge(layout.bytes(), Category::Activations)?;
        let block = self.staging.read(tensor)?;
        let mut file = new_file(&self.folder)?;
        file.write_all(block.as_slice()).map_err(failed("write", &self.folder))?;
        let checksum = crc32fast::hash(block.as_slice());
        let (staging, folder) = (self.staging.clone(), self.folder.clone());
        Ok(Box::new(InFile { staging, folder, file, checksum, layout, _charge: charge }))
    }

    fn usage(&self) -> StoreUsage {
        usage(&self.ledger, &self.staging)
    }
}

struct InFile {
    staging: Arc<Staging>,
    folder: Arc<Path>,
    file: File,
    checksum: u32,
    layout: Layout,
    _charge: Charge,
}

impl StoredTensor for InFile {
    fn take(mut self: Box<Self>) -> Result<Tensor> {
        let mut block = self.staging.empty(self.layout.bytes())?;
        let read = self.file.rewind().and_then(|()| self.file.read_exact(block.as_mut_slice()));
        read.map_err(failed("read", &self.folder))?;
        let (expected, actual) = (self.checksum, crc32fast::hash(block.as_slice()));
        if expected != actual {
            return Err(Error::Damaged { folder: PathBuf::from(&*self.folder), expected, actual });
        }
        self.staging.write(&block, &self.layout)
    }
}

/// A file that has no name, so that nothing is left behind however the process ends.
fn new_file(folder: &Path) -> Result<File> {
    tempfile::tempfile_in(folder).map_err(failed("create", folder))
}

fn failed(action: &'static str, folder: &Path) -> impl FnOnce(io::Error) -> Error {
    let folder = folder.to_owned();
    move |source| Error::Storage { action, folder, source }
}

#[cfg(test)]
mod tests {
    use std::io::SeekFrom;

    use unsloth_core::{DType, Device};

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
    fn damage_is_found_and_named() {
        let (device, folder) = (unsloth_cpu::device(), tempfile::tempdir().unwrap());
        let put = |damage: fn(&mut File)| {
            let (staging, layout) = (Staging::new(None), Layout::of(&tensor(&device, 0.0)));
            let ledger = Ledger::new("disk", None);
            let charge = ledger.charge(layout.bytes(), Category::Activations).unwrap();
            let block = staging.read(&tensor(&device, 0.0)).unwrap();
            let mut file = new_file(folder.path()).unwrap();
            file.write_all(block.as_slice()).unwrap();
            let checksum = crc32fast::hash(block.as_slice());
            damage(&mut file);
            Box::new(InFile { staging, folder: folder.path().into(), file, checksum, layout, _charge: charge }).take()
        };
        assert!(put(|_| {}).is_ok());
        let flipped = put(|file| {
            file.seek(SeekFrom::Start(100)).unwrap();
            file.write_all(&[0xFF]).unwrap();
        });
        assert!(matches!(flipped, Err(Error::Damaged { expected, actual, .. }) if expected != actual));
        let message = put(|file| file.set_len(1000).unwrap()).unwrap_err().to_string();
        assert!(message.starts_with("cannot read a temporary file in `"), "{message}");
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
