//! Where weights come from: a safetensors checkpoint (one file, or shards with an index), or nowhere.
//!
//! Files are memory-mapped. A tensor that is wanted in the type it is stored in is adopted from the mapping without a copy
//! where the device can; any other is converted on its own, so that at most one tensor exists twice. A device that lacks the
//! stored type gets its tensors in f32. The pages of what was copied are given back, so that a checkpoint which is converted as a
//! whole is never in memory twice.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use half::{bf16, f16};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use unsloth_core::{Category, DType, Device, Shape, Tensor, ops::elementwise};

use crate::{Error, Result, digest::Digest, fields::read_object};

/// File with all weights of a model.
pub(crate) const SINGLE: &str = "model.safetensors";
/// File that says which file has which weights.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Where a model takes its weights from.
pub trait WeightSource {
    /// Type that a tensor is stored in; a float.
    ///
    /// # Errors
    /// Depend on the source: it may not have the tensor, or not as a float.
    fn stored_dtype(&self, name: &str) -> Result<DType>;

    /// Takes a tensor, which may be read-only.
    ///
    /// # Errors
    /// As [`WeightSource::stored_dtype`]; [`unsloth_core::Error::OutOfMemory`], [`unsloth_core::Error::UnsupportedDType`].
    fn tensor(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor>;

    /// Takes a tensor as a copy that can be written.
    ///
    /// # Errors
    /// As [`WeightSource::tensor`].
    fn tensor_copy(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor>;
}

/// Weights of arbitrary contents: memory without a checkpoint, which is all that a device which only plans looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShapesOnly {
    /// What every tensor counts as stored in.
    pub dtype: DType,
}

impl WeightSource for ShapesOnly {
    fn stored_dtype(&self, _name: &str) -> Result<DType> {
        Ok(self.dtype)
    }

    fn tensor(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        Ok(device.empty(wanted.shape, wanted.dtype, wanted.category)?)
    }

    fn tensor_copy(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        self.tensor(device, wanted)
    }
}

/// What to take from a source of weights.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Name of the tensor.
    pub name: &'a str,
    /// Shape it must have.
    pub shape: Shape,
    /// Type to give it; a float.
    pub dtype: DType,
    /// What the memory is for.
    pub category: Category,
}

/// Where a tensor lies.
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

impl MappedFile {
    /// Gives back the pages of bytes that were copied. Who reads them again gets them from the file.
    #[cfg(unix)]
    #[allow(unsafe_code, reason = "memmap2 has no other way to give back a part of a mapping")]
    fn release(&self, bytes: Range<usize>) {
        // SAFETY: what is dropped is a clean copy of the file, which nobody changes, as the documentation of `Checkpoint` asks.
        // Where the system refuses, the pages stay until the file is closed: nothing but memory is lost.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
    }

    /// Pages stay until the file is closed.
    #[cfg(not(unix))]
    fn release(&self, _bytes: Range<usize>) {}
}

/// Memory-mapped tensors by name. The files must not be changed while tensors taken from them are alive.
pub struct Checkpoint {
    /// The single file, or the index.
    path: PathBuf,
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
    used: RefCell<BTreeSet<String>>,
}

impl Checkpoint {
    /// Opens `model.safetensors` of a folder, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::NoWeights`]; otherwise as [`Checkpoint::open_file`], and [`Error::Json`], [`Error::MissingShard`] or
    /// [`Error::MisplacedTensor`] where index and shards disagree.
    pub fn open(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        if single.is_file() {
            Self::open_file(&single)
        } else if index.is_file() {
            Self::open_index(&index, folder)
        } else {
            Err(Error::NoWeights { path: folder.to_owned() })
        }
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::CorruptWeights`] for a truncated or damaged file.
    pub fn open_file(path: &Path) -> Result<Self> {
        let (file, entries) = map_file(path, 0)?;
        Ok(Self { path: path.to_owned(), files: vec![file], entries, used: RefCell::default() })
    }

    fn open_index(path: &Path, folder: &Path) -> Result<Self> {
        let (mut files, mut entries) = (Vec::new(), BTreeMap::new());
        let mut shards: BTreeMap<String, BTreeMap<String, Entry>> = BTreeMap::new();
        for (name, shard) in weight_map(path)? {
            let held = match shards.entry(shard) {
                std::collections::btree_map::Entry::Occupied(held) => held.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => {
                    let shard_path = folder.join(new.key());
                    if !shard_path.is_file() {
                        return Err(Error::MissingShard { index: path.to_owned(), shard: new.key().clone() });
                    }
                    let (file, held) = map_file(&shard_path, files.len())?;
                    files.push(file);
                    new.insert(held)
                }
            };
            let Some(entry) = held.remove(&name) else {
                let what = "not in the shard that the index names";
                return Err(Error::MisplacedTensor { path: path.to_owned(), name, what });
            };
            entries.insert(name, entry);
        }
        Ok(Self { path: path.to_owned(), files, entries, used: RefCell::default() })
    }

    /// The file, or the index of a sharded checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Names of the tensors that nobody has taken, sorted.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        self.entries.keys().filter(|name| !used.contains(*name)).cloned().collect()
    }

    /// Shape of a tensor as stored.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn stored_shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.shape)
    }

    /// A tensor in the type that it is stored in, or in f32 on a device that lacks that type.
    fn stored(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        let dtype = match wanted.dtype {
            DType::I32 => self.element_dtype(wanted.name)?,
            _ => self.stored_dtype(wanted.name)?,
        };
        let entry = self.entry(wanted.name)?;
        let file = &self.files[entry.file];
        if *entry.shape != *wanted.shape {
            let (path, name) = (file.path.clone(), wanted.name.to_owned());
            return Err(Error::TensorShape { path, name, expected: wanted.shape, actual: entry.shape.clone() });
        }
        let bytes = entry.bytes.clone();
        let tensor = if device.supports(dtype) {
            device.adopt(file.map.clone(), bytes, wanted.shape, dtype, wanted.category)
        } else {
            let values = widened(dtype, &file.map[bytes]);
            device.from_slice(&values, wanted.shape, wanted.category)
        };
        let tensor = self.place(wanted.name, tensor)?;
        self.used.borrow_mut().insert(wanted.name.to_owned());
        Ok(tensor)
    }

    /// What is made of a stored tensor, whose pages are not kept unless it reads them itself.
    fn taken(
        &self,
        device: &Device,
        wanted: &Wanted<'_>,
        make: impl FnOnce(&Tensor) -> unsloth_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let entry = self.entry(wanted.name)?;
        let file = &self.files[entry.file];
        let readers = Arc::strong_count(&file.map);
        let made = self.place(wanted.name, make(&self.stored(device, wanted)?))?;
        if Arc::strong_count(&file.map) == readers {
            file.release(entry.bytes.clone());
        }
        Ok(made)
    }

    /// The tensor at fault for an error of the device.
    fn place<T>(&self, name: &str, result: unsloth_core::Result<T>) -> Result<T> {
        let (path, name) = (&self.path, name.to_owned());
        result.map_err(|source| Error::PlaceTensor { path: path.clone(), name, source: source.into() })
    }

    /// Type that a tensor is stored in, a weight or not.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::TensorDType`] unless it is f32, f16, bf16 or i32.
    pub(crate) fn element_dtype(&self, name: &str) -> Result<DType> {
        match self.entry(name)?.dtype {
            Dtype::I32 => Ok(DType::I32),
            _ => self.stored_dtype(name),
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || Error::MissingTensor { path: self.path.clone(), name: name.to_owned() };
        self.entries.get(name).ok_or_else(missing)
    }
}

impl WeightSource for Checkpoint {
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::TensorDType`] unless it is f32, f16 or bf16.
    fn stored_dtype(&self, name: &str) -> Result<DType> {
        let entry = self.entry(name)?;
        match entry.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => {
                let path = self.files[entry.file].path.clone();
                Err(Error::TensorDType { path, name: name.to_owned(), actual: other.to_string() })
            }
        }
    }

    /// The mapped bytes themselves where they have the wanted type and the device can read them, else a converted copy.
    ///
    /// # Errors
    /// As [`Checkpoint::stored_dtype`]; [`Error::TensorShape`]; [`Error::PlaceTensor`] if the device has no room for it, or
    /// lacks its type.
    fn tensor(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        self.taken(device, wanted, |stored| elementwise::cast(stored, wanted.dtype))
    }

    /// # Errors
    /// As [`WeightSource::tensor`] of a checkpoint.
    fn tensor_copy(&self, device: &Device, wanted: &Wanted<'_>) -> Result<Tensor> {
        self.taken(device, wanted, |stored| match stored.dtype() == wanted.dtype {
            // A cast to the same type would share the mapping.
            true => elementwise::copy(stored),
            false => elementwise::cast(stored, wanted.dtype),
        })
    }
}

/// The elements of a half type; every one is an f32.
fn widened(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let halves = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match dtype {
        DType::F16 => halves.map(|bits| f16::from_bits(bits).to_f32()).collect(),
        DType::BF16 => halves.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        other => unreachable!("every device has {other}"),
    }
}

#[allow(unsafe_code, reason = "mapping a file is the only way to use weights without copying them")]
fn map_file(path: &Path, index: usize) -> Result<(MappedFile, BTreeMap<String, Entry>)> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    // SAFETY: the mapping is private and never written through; that nobody changes the file meanwhile is what the
    // documentation of `Checkpoint` asks of the caller. All reads lie within the length checked against the header below.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    let (header_bytes, metadata) =
        SafeTensors::read_metadata(&map).map_err(|source| Error::CorruptWeights { path: path.to_owned(), source })?;
    // The header's own length stands before it in eight bytes.
    let data = 8 + header_bytes;
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
        (name, Entry { file: index, dtype: info.dtype, shape: info.shape.clone(), bytes })
    };
    let entries = metadata.tensors().into_iter().map(entry).collect();
    Ok((MappedFile { path: path.to_owned(), map: Arc::new(map) }, entries))
}

/// SHA-256 of what tells one model from another without reading its weights: `config.json`, and the size and the header of each
/// weight file, which has the names, types, shapes and places of the tensors. With `config_only` of `config.json` alone.
///
/// # Errors
/// [`Error::Io`]; as [`Checkpoint::open`] for an index that cannot be read.
pub(crate) fn identity(folder: &Path, config_only: bool) -> Result<String> {
    let mut digest = Digest::default();
    let config = folder.join("config.json");
    digest.bytes(&std::fs::read(&config).map_err(Error::io("read", &config))?);
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    let files: BTreeSet<PathBuf> = match (config_only, single.is_file(), index.is_file()) {
        (true, ..) | (_, false, false) => BTreeSet::new(),
        (_, true, _) => BTreeSet::from([single]),
        (_, _, true) => weight_map(&index)?.into_values().map(|shard| folder.join(shard)).collect(),
    };
    for path in files {
        let mut file = File::open(&path).map_err(Error::io("read", &path))?;
        let num_bytes = file.metadata().map_err(Error::io("read", &path))?.len();
        // The header's own length stands before it in eight bytes.
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(Error::io("read", &path))?;
        let mut header = Vec::new();
        let header_bytes = u64::from_le_bytes(length).min(num_bytes);
        file.take(header_bytes).read_to_end(&mut header).map_err(Error::io("read", &path))?;
        digest.numbers([num_bytes as i64]);
        digest.bytes(&header);
    }
    Ok(digest.finish())
}

/// The shards that an index file names.
#[cfg(feature = "hub")]
pub(crate) fn shards(path: &Path) -> Result<BTreeSet<String>> {
    Ok(weight_map(path)?.into_values().collect())
}

/// Tensor names and the shard that holds each, from an index file.
fn weight_map(path: &Path) -> Result<BTreeMap<String, String>> {
    let index = read_object(path)?;
    let refuse = |field: String, value: String, rule| Error::Config { path: path.to_owned(), field, value, rule };
    let Some(Value::Object(map)) = index.get("weight_map") else {
        let value = index.get("weight_map").map_or_else(|| "missing".to_owned(), Value::to_string);
        return Err(refuse("weight_map".to_owned(), value, "an object of tensor names and file names"));
    };
    let shard = |(name, file): (&String, &Value)| {
        // A name with a folder in it could lead out of the checkpoint.
        let plain = |file: &&str| Path::new(file).file_name().is_some_and(|name| name == *file);
        match file.as_str().filter(plain) {
            Some(file) => Ok((name.clone(), file.to_owned())),
            None => {
                Err(refuse(format!("weight_map.{name}"), file.to_string(), "the name of a file in the same folder"))
            }
        }
    };
    map.iter().map(shard).collect()
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// Bytes of a mapping that are in memory, by `/proc/self/smaps`: the first `Rss:` after the line that begins with its address.
    fn resident(map: &Mmap) -> usize {
        let (all, address) =
            (std::fs::read_to_string("/proc/self/smaps").unwrap(), format!("{:x}-", map.as_ptr() as usize));
        let rss = all.lines().skip_while(|line| !line.starts_with(&address)).find_map(|line| line.strip_prefix("Rss:"));
        rss.unwrap().trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    #[test]
    fn pages_of_what_was_copied_are_given_back() {
        const ROWS: usize = 1024;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SINGLE);
        let bytes = vec![0x40u8; ROWS * ROWS * 4];
        let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![ROWS, ROWS], &bytes).unwrap();
        let no_metadata = None;
        safetensors::serialize_to_file([("a", view.clone()), ("b", view)], no_metadata, &path).unwrap();
        let (checkpoint, cpu) = (Checkpoint::open(folder.path()).unwrap(), unsloth_cpu::device());
        let map = &checkpoint.files[0].map;
        let shape = Shape::from([ROWS, ROWS]);
        let wanted = |name, dtype| Wanted { name, shape, dtype, category: Category::Weights };
        let shared = checkpoint.tensor(&cpu, &wanted("a", DType::F32)).unwrap();
        let first = shared.to_vec::<f32>().unwrap();
        assert!(resident(map) >= bytes.len(), "a tensor in the mapping was read: {} bytes", resident(map));
        let converted = checkpoint.tensor(&cpu, &wanted("b", DType::BF16)).unwrap();
        let copied = checkpoint.tensor_copy(&cpu, &wanted("b", DType::F32)).unwrap();
        // What the two tensors have in common at their border, and what the system reads ahead, is not given back.
        assert!(resident(map) < bytes.len() + bytes.len() / 4, "{} bytes", resident(map));
        assert_eq!(copied.to_vec::<f32>().unwrap(), first);
        assert_eq!(converted.to_vec::<bf16>().unwrap()[0].to_f32(), bf16::from_f32(first[0]).to_f32());
    }
}
