//! What a copy on a stream of its own waits for, by CubeCL's bookkeeping for devices whose streams are queues, such as CUDA's. It is asked
//! here without such a device: copies beside kernels are right only while it answers so.
#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test itself")]

use std::{collections::HashMap, sync::Arc};

use cubecl::{
    server::{Binding, Handle, ServerError},
    stream_id::StreamId,
};
use cubecl_runtime::{
    logging::ServerLogger,
    stream::{EventStreamBackend, MultiStream},
};

struct Device;

#[derive(Debug, Default)]
struct Stream {
    /// When each buffer was made, by its size, which is another for each here.
    made: HashMap<u64, u64>,
    num_waits: usize,
}

impl EventStreamBackend for Device {
    type Stream = Stream;
    type Event = ();

    fn create_stream(&self) -> Stream {
        Stream::default()
    }
    fn handle_cursor(stream: &Stream, buffer: &Binding) -> u64 {
        stream.made[&buffer.size]
    }
    fn is_healthy(_stream: &Stream) -> bool {
        true
    }
    fn flush(_stream: &mut Stream) {}
    fn wait_event(stream: &mut Stream, (): ()) {
        stream.num_waits += 1;
    }
    fn wait_event_sync((): ()) -> Result<(), ServerError> {
        Ok(())
    }
}

const KERNELS: StreamId = StreamId { value: 0 };
const COPIES: StreamId = StreamId { value: 1 };

/// A buffer on the stream of the kernels, made now, as cubecl-cuda notes it.
fn make(streams: &mut MultiStream<Device>, size: u64) -> Binding {
    let mut resolved = streams.resolve(KERNELS, [].into_iter(), false).unwrap();
    let now = resolved.cursor;
    resolved.current().made.insert(size, now);
    Handle::new(KERNELS, size).binding()
}

/// How often the stream of the copies waits for the other to read these buffers.
fn waits(streams: &mut MultiStream<Device>, buffers: &[&Binding]) -> usize {
    let before = streams.resolve(COPIES, [].into_iter(), false).unwrap().current().num_waits;
    let mut read = streams.resolve(COPIES, buffers.iter().copied(), false).unwrap();
    read.current().num_waits - before
}

#[test]
fn a_copy_waits_for_kernels_if_a_buffer_was_made_for_it() {
    let mut streams = MultiStream::new(Arc::new(ServerLogger::default()), Device, 8);
    let (a, b) = (make(&mut streams, 1), make(&mut streams, 2));
    assert_eq!(waits(&mut streams, &[&a]), 1);
    // A kernel writes to `b`, which is older than the copy of `a`: its own copy would not wait for that.
    streams.resolve(KERNELS, [&b].into_iter(), false).unwrap();
    assert_eq!(waits(&mut streams, &[&b]), 0);
    // A buffer made behind the kernel makes it wait, and again after the next one.
    for size in 3..6 {
        streams.resolve(KERNELS, [&b].into_iter(), false).unwrap();
        let meeting = make(&mut streams, size);
        assert_eq!(waits(&mut streams, &[&b, &meeting]), 1);
    }
}
