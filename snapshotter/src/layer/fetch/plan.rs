//! Which members to fetch together: the wanted ones with their neighbours, as ranges of the blob.
//!
//! Pure: it reads the index and asks what is free. A group never contains a member that is resident or under way, so
//! no byte of a member is fetched twice; it ends there instead.

use std::ops::Range;

use estargz::index::LayerIndex;

/// Longest stretch between two members (tar headers, hidden files) that is fetched to keep them in one request.
const MAX_GAP: u64 = 64 << 10;
/// What a member may have beyond its chunks' own size and still be fetched whole; no deflate stream of theirs is longer.
const MEMBER_SLACK: u64 = 256 << 10;
/// Members in one group at most, whatever their sizes: bounds the claims that one read can make.
const MAX_MEMBERS: u32 = 4096;

/// What is fetched again to keep two holes in one request is at most one in so many bytes.
const BRIDGED_SHARE: u64 = 25;

/// How far a group may reach.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    /// Compressed bytes to fetch around what is wanted.
    pub(super) window: u64,
    /// Compressed bytes in one group at most, unless one member alone is larger.
    pub(super) max: u64,
}

/// The groups that fetch the members `wanted` (sorted), each a range of consecutive members.
pub(super) fn groups<B: AsRef<[u8]>>(
    index: &LayerIndex<B>,
    wanted: &[u32],
    free: impl Fn(u32) -> bool,
    reach: Reach,
) -> Vec<Range<u32>> {
    let mut groups: Vec<Range<u32>> = Vec::new();
    for &member in wanted {
        let after = groups.last().map_or(0, |group| group.end);
        if member < after {
            continue;
        }
        let is_wanted = |member: u32| wanted.binary_search(&member).is_ok();
        let mut group = member..member + 1;
        // Programs and libraries are read forwards; an eighth behind the miss catches what shares its directory.
        let ahead = reach.window - reach.window / 8;
        while can_join(index, group.end - 1, group.end, &free) && group.len() < MAX_MEMBERS as usize {
            let length = span(index, &(group.start..group.end + 1));
            if length > reach.max || (length > ahead && !is_wanted(group.end)) {
                break;
            }
            group.end += 1;
        }
        while group.start > after
            && can_join(index, group.start - 1, group.start - 1, &free)
            && group.len() < MAX_MEMBERS as usize
        {
            let length = span(index, &(group.start - 1..group.end));
            if length > reach.window || !adjacent(index, group.start - 1, group.start) {
                break;
            }
            group.start -= 1;
        }
        groups.push(group);
    }
    groups
}

/// The members from `from` on that lie in one piece before `until` and are free, at most `max` bytes of them.
pub(super) fn run<B: AsRef<[u8]>>(
    index: &LayerIndex<B>,
    from: u32,
    until: u64,
    free: impl Fn(u32) -> bool,
    max: u64,
) -> Option<Range<u32>> {
    let before_end = |member: u32| index.member(member).is_some_and(|member| member.start < until);
    let start = (from..index.member_count())
        .take_while(|&member| before_end(member))
        .find(|&member| free(member))?;
    let mut group = start..start + 1;
    while before_end(group.end)
        && can_join(index, group.end - 1, group.end, &free)
        && group.len() < MAX_MEMBERS as usize
        && span(index, &(group.start..group.end + 1)) <= max
    {
        group.end += 1;
    }
    Some(group)
}

/// The free members from `from` on that one request of at most `max` bytes fetches; what is resident between them is fetched
/// again as long as it is hardly anything, or whatever it is where the length of a request is no matter.
pub(super) fn holes<B: AsRef<[u8]>>(
    index: &LayerIndex<B>,
    from: u32,
    free: impl Fn(u32) -> bool,
    max: u64,
) -> Option<Vec<u32>> {
    let first = (from..index.member_count()).find(|&member| free(member))?;
    let start = member_range(index, first).start;
    let size = |member: u32| {
        let range = member_range(index, member);
        range.end - range.start
    };
    let (mut members, mut wanted, mut bridged) = (vec![first], size(first), 0);
    for next in first + 1..index.member_count() {
        if members.len() >= MAX_MEMBERS as usize || !adjacent(index, next - 1, next) {
            break;
        }
        if !free(next) {
            bridged += size(next);
            // Even all that the request may hold would not make up for it.
            if max != u64::MAX && bridged > max / BRIDGED_SHARE {
                break;
            }
            continue;
        }
        let would = wanted + size(next);
        let is_dear = max != u64::MAX && bridged > would / BRIDGED_SHARE;
        if member_range(index, next).end - start > max || is_dear {
            break;
        }
        wanted = would;
        members.push(next);
    }
    Some(members)
}

/// The blob range of a group.
pub(super) fn blob_range<B: AsRef<[u8]>>(index: &LayerIndex<B>, group: &Range<u32>) -> Range<u64> {
    let first = member_range(index, group.start).start;
    let last = member_range(index, group.end.saturating_sub(1)).end;
    first..last.max(first)
}

/// The compressed bytes of a member that its chunks can need; empty for a member that is not there.
///
/// The index ends a member where the next begins, however far that is: a blob with a hole must not make us fetch the hole.
pub(super) fn member_range<B: AsRef<[u8]>>(index: &LayerIndex<B>, member: u32) -> Range<u64> {
    let Some(entry) = index.member(member) else { return 0..0 };
    let needed = unfolded_size(index, member);
    let longest = needed + needed / 64 + MEMBER_SLACK;
    entry.start..entry.end.min(entry.start.saturating_add(longest))
}

/// How much of the unfolded member its chunks cover.
pub(super) fn unfolded_size<B: AsRef<[u8]>>(index: &LayerIndex<B>, member: u32) -> u64 {
    let chunks = index.member(member).map_or(0..0, |member| member.chunks);
    let end = |chunk: u32| {
        index
            .chunk(chunk)
            .map_or(0, |chunk| chunk.inner_offset.saturating_add(u64::from(chunk.size)))
    };
    chunks.map(end).max().unwrap_or(0)
}

fn span<B: AsRef<[u8]>>(index: &LayerIndex<B>, group: &Range<u32>) -> u64 {
    let range = blob_range(index, group);
    range.end - range.start
}

fn can_join<B: AsRef<[u8]>>(index: &LayerIndex<B>, near: u32, next: u32, free: impl Fn(u32) -> bool) -> bool {
    next < index.member_count() && free(next) && (near == next || adjacent(index, near, next))
}

fn adjacent<B: AsRef<[u8]>>(index: &LayerIndex<B>, left: u32, right: u32) -> bool {
    member_range(index, right)
        .start
        .saturating_sub(member_range(index, left).end)
        <= MAX_GAP
}
