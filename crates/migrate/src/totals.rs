//! What both sides count of a checkpoint on its way.

use limosa_image::PAGE;

use crate::frame::{Header, PAGES_HEAD};
use crate::message::End;

/// Counts and digest of the content messages so far.
#[derive(Default)]
pub(crate) struct Totals {
    pub(crate) states: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) blobs: u64,
    pub(crate) blob_bytes: u64,
    messages: u64,
    digest: blake3::Hasher,
}

impl Totals {
    /// Counts one content message.
    pub(crate) fn note(&mut self, header: &Header) {
        self.messages += 1;
        self.digest.update(&header.0);
    }

    /// The message that says so.
    pub(crate) fn end(&self) -> End {
        End {
            states: self.states,
            memory_bytes: self.memory_bytes,
            blobs: self.blobs,
            blob_bytes: self.blob_bytes,
            messages: self.messages,
            digest: self.digest.finalize().as_bytes().to_vec(),
        }
    }
}

/// The payload of a `Gone` message.
pub(crate) fn gone(space: u32, start: u64, length: u64) -> [u8; PAGES_HEAD + 8] {
    let mut payload = [0; PAGES_HEAD + 8];
    payload[..PAGES_HEAD].copy_from_slice(&pages_head(space, start));
    payload[PAGES_HEAD..].copy_from_slice(&length.to_le_bytes());
    payload
}

/// Space, start address and length of a `Gone` payload: whole pages, at least one, below the end of the address space.
pub(crate) fn split_gone(payload: &[u8]) -> Option<(u32, u64, u64)> {
    let (head, length) = payload.split_first_chunk::<PAGES_HEAD>()?;
    let length = u64::from_le_bytes(length.try_into().ok()?);
    let (space, rest) = head.split_first_chunk::<4>()?;
    let (reserved, start) = rest.split_first_chunk::<4>()?;
    let start = u64::from_le_bytes(start.try_into().ok()?);
    let whole = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0;
    let good = whole && *reserved == [0; 4] && start.checked_add(length).is_some();
    good.then_some((u32::from_le_bytes(*space), start, length))
}

/// The head of a `Pages` payload.
pub(crate) fn pages_head(space: u32, start: u64) -> [u8; PAGES_HEAD] {
    let mut head = [0; PAGES_HEAD];
    head[..4].copy_from_slice(&space.to_le_bytes());
    head[8..].copy_from_slice(&start.to_le_bytes());
    head
}

/// Space, start address and memory of a `Pages` payload: whole pages, at least one, below the end of the address
/// space.
pub(crate) fn split_pages(payload: &[u8]) -> Option<(u32, u64, &[u8])> {
    let (space, rest) = payload.split_first_chunk::<4>()?;
    let (reserved, rest) = rest.split_first_chunk::<4>()?;
    let (start, data) = rest.split_first_chunk::<8>()?;
    let (start, length) = (u64::from_le_bytes(*start), data.len() as u64);
    let whole = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0;
    (whole && *reserved == [0; 4] && start.checked_add(length).is_some()).then_some((
        u32::from_le_bytes(*space),
        start,
        data,
    ))
}
