//! Memory as a pool takes it from the system.

#[cfg(target_os = "linux")]
use memmap2::{Advice, MmapMut};

/// One cache line; makes a block 64-byte aligned without pointer arithmetic.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u8; LINE_BYTES]);

/// Bytes that the length and the alignment of a block are multiples of.
pub(crate) const LINE_BYTES: usize = 64;

/// A page of the size that processors have besides the ordinary one of 4 KiB.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Whole cache lines, zero until they are written. Nothing is touched before.
pub(crate) struct Block(Memory);

enum Memory {
    Lines(Vec<Line>),
    /// A block with room for a huge page, which starts with one if the system gives them. Panels of a product are read in steps that are
    /// about as long as an ordinary page, more of them than a processor remembers the places of.
    #[cfg(target_os = "linux")]
    HugePages {
        mapping: MmapMut,
        start: usize,
        bytes: usize,
    },
}

impl Block {
    /// No memory.
    pub(crate) fn empty() -> Self {
        Self(Memory::Lines(Vec::new()))
    }

    /// `None` if the system refuses.
    pub(crate) fn zeroed(num_lines: usize) -> Option<Self> {
        #[cfg(target_os = "linux")]
        if let Some(bytes) = num_lines.checked_mul(LINE_BYTES).filter(|&bytes| bytes >= HUGE_PAGE_BYTES) {
            // Not every system starts a mapping where a huge page can.
            let mapping = MmapMut::map_anon(bytes.checked_add(HUGE_PAGE_BYTES)?).ok()?;
            let start = mapping.as_ptr().align_offset(HUGE_PAGE_BYTES);
            // A system without huge pages refuses, and has given ordinary ones.
            let _ = mapping.advise_range(Advice::HugePage, start, bytes);
            return Some(Self(Memory::HugePages { mapping, start, bytes }));
        }
        bytemuck::try_zeroed_vec(num_lines).ok().map(|lines| Self(Memory::Lines(lines)))
    }

    pub(crate) fn num_lines(&self) -> usize {
        self.as_slice().len() / LINE_BYTES
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Memory::Lines(lines) => bytemuck::cast_slice(lines),
            #[cfg(target_os = "linux")]
            Memory::HugePages { mapping, start, bytes } => &mapping[*start..][..*bytes],
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Lines(lines) => bytemuck::cast_slice_mut(lines),
            #[cfg(target_os = "linux")]
            Memory::HugePages { mapping, start, bytes } => &mut mapping[*start..][..*bytes],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_every_size_are_whole_aligned_and_zero() {
        for num_lines in [0, 1, 1000, (2 << 20) / LINE_BYTES - 1, (2 << 20) / LINE_BYTES, (5 << 20) / LINE_BYTES + 3] {
            let mut block = Block::zeroed(num_lines).unwrap();
            assert_eq!((block.num_lines(), block.as_slice().len()), (num_lines, num_lines * LINE_BYTES));
            assert!(block.as_slice().as_ptr().addr().is_multiple_of(LINE_BYTES));
            assert!(block.as_slice().iter().all(|&byte| byte == 0));
            block.as_mut_slice().fill(7);
            assert!(block.as_slice().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn what_no_system_has_is_refused() {
        assert!(Block::zeroed(1 << 52).is_none());
        assert!(Block::zeroed(usize::MAX).is_none());
    }
}
