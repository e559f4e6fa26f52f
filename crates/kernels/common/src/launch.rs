//! Checks and geometry of one launch.

use cubecl::{ir::StorageType, prelude::*, server::Handle};

use crate::{Choices, LaunchError, Target};

/// Launches a kernel of this workspace without CubeCL's checks of every index: those wait for each load at once, where the kernel
/// has put other work between a load and its use.
///
/// Kernels hold their part: an index is compared with sizes that the launch passes, and [`Launch::vectors`] has compared those with
/// the buffers.
#[macro_export]
macro_rules! unchecked {
    ($launch:expr) => {{
        #[allow(unsafe_code, clippy::macro_metavars_in_unsafe, reason = "without checks of every index")]
        // SAFETY: kernels index below the lengths of their buffers: see the macro.
        unsafe {
            $launch
        }
    }};
}

/// One launch of one kernel on one device: refuses what the device would fail at in silence.
pub struct Launch<'a, R: Runtime> {
    target: Target<'a, R>,
    kernel: &'static str,
}

/// Cubes of one dimension of units that share rows or items.
#[derive(Clone, Debug)]
pub struct RowGrid {
    /// Number of cubes. `CUBE_POS` counts through all dimensions.
    pub count: CubeCount,
    /// Units of a cube in one dimension.
    pub dim: CubeDim,
    /// The same number for a compile-time argument; a power of two.
    pub units: usize,
}

impl<'a, R: Runtime> Launch<'a, R> {
    /// Checks for a launch of `kernel`, named in every error.
    pub fn new(client: &'a ComputeClient<R>, kernel: &'static str) -> Self {
        Self::on(client.into(), kernel)
    }

    /// The same, of kernels among which there may be a choice.
    pub fn on(target: Target<'a, R>, kernel: &'static str) -> Self {
        Self { target, kernel }
    }

    /// The client to launch on.
    pub fn client(&self) -> &'a ComputeClient<R> {
        self.target.client
    }

    /// What decides between kernels for the same job; without it, they are chosen by rule.
    pub fn choices(&self) -> Option<&'a dyn Choices> {
        self.target.choices
    }

    /// The name given to [`Launch::new`].
    pub fn kernel(&self) -> &'static str {
        self.kernel
    }

    fn limit(&self, what: &'static str, value: u64, limit: u64) -> Result<(), LaunchError> {
        if value <= limit { Ok(()) } else { Err(LaunchError::Limit { kernel: self.kernel, what, value, limit }) }
    }

    /// # Errors
    /// [`LaunchError::Unsupported`] unless the device stores and computes with `E`.
    pub fn element<E: CubePrimitive>(&self) -> Result<(), LaunchError> {
        let element = E::as_type_native_unchecked();
        if self.client().properties().supports_type(element) {
            return Ok(());
        }
        let device = R::name(self.client()).to_owned();
        Err(LaunchError::Unsupported { kernel: self.kernel, what: format!("element type {element}"), device })
    }

    /// A buffer as an array of `len` elements of `E` in vectors of `width`.
    ///
    /// # Errors
    /// [`LaunchError::Length`] if the buffer is smaller; [`LaunchError::Limit`] beyond 2^31 elements, which kernels index in
    /// 32 bits on some devices, or beyond the largest binding; [`LaunchError::Invalid`] if `width` does not divide `len`.
    pub fn vectors<E: CubePrimitive>(
        &self,
        arg: &'static str,
        handle: &Handle,
        len: usize,
        width: usize,
    ) -> Result<ArrayArg<R>, LaunchError> {
        self.vectors_of(arg, handle, E::as_type_native_unchecked().storage_type(), (len, width))
    }

    /// The same, of an element type that is known at run time.
    ///
    /// # Errors
    /// As [`Launch::vectors`].
    pub fn vectors_of(
        &self,
        arg: &'static str,
        handle: &Handle,
        element: StorageType,
        (len, width): (usize, usize),
    ) -> Result<ArrayArg<R>, LaunchError> {
        let kernel = self.kernel;
        if width == 0 || !len.is_multiple_of(width) {
            let (value, rule) = (len as u64, "a multiple of the vector width");
            return Err(LaunchError::Invalid { kernel, field: arg, value, rule });
        }
        let expected = (len as u64).saturating_mul(element.size() as u64);
        let actual = handle.size_in_used();
        if actual < expected {
            return Err(LaunchError::Length { kernel, arg, expected, actual });
        }
        self.limit("elements of a buffer", len as u64, i32::MAX as u64)?;
        self.limit("bytes of a buffer", expected, self.client().properties().memory.max_page_size)?;
        #[allow(unsafe_code, reason = "CubeCL takes the length of a raw buffer on trust")]
        // SAFETY: the buffer holds at least `len` elements of `element`: compared just above.
        Ok(unsafe { ArrayArg::from_raw_parts(handle.clone(), len / width) })
    }

    /// A buffer as an array of `len` elements of `E`.
    ///
    /// # Errors
    /// As [`Launch::vectors`].
    pub fn array<E: CubePrimitive>(
        &self,
        arg: &'static str,
        handle: &Handle,
        len: usize,
    ) -> Result<ArrayArg<R>, LaunchError> {
        self.vectors::<E>(arg, handle, len, 1)
    }

    /// # Errors
    /// [`LaunchError::Limit`] if the cube has more units, or needs more shared memory, than the device offers.
    pub fn cube(&self, dim: CubeDim, shared_bytes: usize) -> Result<(), LaunchError> {
        let hardware = &self.client().properties().hardware;
        self.limit("units per cube", u64::from(dim.num_elems()), u64::from(hardware.max_units_per_cube))?;
        self.limit("cube width", u64::from(dim.x), u64::from(hardware.max_cube_dim.0))?;
        self.limit("cube height", u64::from(dim.y), u64::from(hardware.max_cube_dim.1))?;
        self.limit("cube depth", u64::from(dim.z), u64::from(hardware.max_cube_dim.2))?;
        self.limit("bytes of shared memory", shared_bytes as u64, hardware.max_shared_memory_size as u64)
    }

    /// # Errors
    /// [`LaunchError::Limit`] if a dimension of the grid exceeds the device's.
    pub fn cubes(&self, x: usize, y: usize, z: usize) -> Result<CubeCount, LaunchError> {
        let most = self.client().properties().hardware.max_cube_count;
        self.limit("cubes in x", x as u64, u64::from(most.0))?;
        self.limit("cubes in y", y as u64, u64::from(most.1))?;
        self.limit("cubes in z", z as u64, u64::from(most.2))?;
        Ok(CubeCount::Static(x as u32, y as u32, z as u32))
    }

    /// Units of a cube that shares `work` items: 16, 64, 128 or 256, whichever first covers them, within the device's limit and not
    /// less than a plane. Always a power of two. Few sizes, because a kernel is compiled anew for each.
    pub fn units_for(&self, work: usize) -> usize {
        let most = self.most_units().min(256);
        let hardware = &self.client().properties().hardware;
        let least = (hardware.plane_size_min.max(1) as usize).next_power_of_two().min(most);
        let units = [16, 64, 128].into_iter().find(|&units| work <= units).unwrap_or(256);
        units.clamp(least, most)
    }

    /// The greatest power of two among the sizes of a cube of one dimension.
    pub fn most_units(&self) -> usize {
        let hardware = &self.client().properties().hardware;
        let most = hardware.max_units_per_cube.min(hardware.max_cube_dim.0) as usize;
        if most.is_power_of_two() { most } else { most.next_power_of_two() / 2 }
    }

    /// [`Launch::units_for`] the work of each of so many rows, or more units where those of few rows, though each has much work,
    /// would not have enough loads under way for the device's memory.
    fn units_for_rows(&self, rows: usize, work: usize) -> usize {
        let processors = self.client().properties().hardware.num_streaming_multiprocessors.unwrap_or(0) as usize;
        let are_few = rows < 8 * processors && work >= 8192;
        if are_few { self.most_units().min(1024) } else { self.units_for(work) }
    }

    /// One cube per row of `work` items: row `CUBE_POS`. In two dimensions where one does not hold them all, so that there may be
    /// cubes without a row. (Cubes that walk over rows would be fewer, but a loop around the barriers of a row doubles the time
    /// that a software device compiles: for kernels that keep something from row to row.)
    pub fn rows(&self, rows: usize, work: usize) -> RowGrid {
        self.rows_of(rows, self.units_for_rows(rows, work))
    }

    /// The same, of so many units, a power of two.
    pub fn rows_of(&self, rows: usize, units: usize) -> RowGrid {
        let most = self.client().properties().hardware.max_cube_count.0 as usize;
        let lines = rows.div_ceil(most).max(1);
        let count = CubeCount::Static(rows.div_ceil(lines).max(1) as u32, lines as u32, 1);
        RowGrid { count, dim: CubeDim::new_1d(units as u32), units }
    }

    /// Units that each take items `unit`, `unit + total`, ...: enough cubes to fill any device.
    pub fn flat(&self, items: usize) -> RowGrid {
        let units = self.units_for(items);
        let most = self.client().properties().hardware.max_cube_count.0 as usize;
        let count = CubeCount::Static(items.div_ceil(units).clamp(1, most.min(32 * 1024)) as u32, 1, 1);
        RowGrid { count, dim: CubeDim::new_1d(units as u32), units }
    }

    /// The widest vector of `E` that divides `len`, at most what one load of the device carries.
    pub fn vector_width<E: CubePrimitive>(&self, len: usize) -> usize {
        let hardware = &self.client().properties().hardware;
        let bits = E::as_type_native_unchecked().size_bits().max(1);
        let widest = (hardware.load_width as usize / bits).min(hardware.max_vector_size).min(8);
        [8, 4, 2].into_iter().find(|&width| width <= widest && len.is_multiple_of(width)).unwrap_or(1)
    }
}
