//! The tree that a TOC describes: every path once, implied directories added, later duplicates winning, whiteouts and
//! opaque marks translated, hard links resolved, inode numbers given.
//!
//! Used only by [`super::build()`]. Time and memory are linear in the TOC: names stay slices of the entries' strings, and
//! the number of nodes is bounded by [`MAX_INODES`].

use std::collections::HashMap;

use super::error::{EntryFault, IndexError, shortened};
use crate::toc::{
    EntryType, MAX_DEPTH, MAX_NAME_BYTES, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_TAR_NAME, Toc, clean_path,
};

/// Most files and directories in a layer, implied ones included: 2^21, twice the limit of entries. A TOC whose every
/// path is deep and new could otherwise imply a thousand directories per entry.
pub const MAX_INODES: usize = 1 << 21;

const ROOT: u32 = 0;
const WHITEOUT_PREFIX: &str = ".wh.";
/// Names of the layer format itself: the opaque mark, and what AUFS left in old layers.
const WHITEOUT_META_PREFIX: &str = ".wh..wh.";
const OPAQUE_MARK: &str = ".wh..wh..opq";

/// What a node of the tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Described by the entry at this position.
    Entry(u32),
    /// A directory that other paths imply.
    Implied,
    /// A whiteout whose mark is the entry at this position.
    Whiteout(u32),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Node<'a> {
    pub(super) parent: u32,
    pub(super) name: &'a str,
    pub(super) origin: Origin,
    /// Entry of the opaque mark in this directory.
    pub(super) opaque: Option<u32>,
    /// First entry that named this path, for messages about implied directories.
    first_entry: u32,
}

/// The tree of a TOC. Node 0 is the root.
pub(super) struct Tree<'a> {
    toc: &'a Toc,
    pub(super) nodes: Vec<Node<'a>>,
    by_name: HashMap<(u32, &'a str), u32>,
    /// For each node the node whose inode it shows: itself, or the end of a chain of hard links.
    pub(super) inode_node: Vec<u32>,
}

impl<'a> Tree<'a> {
    pub(super) fn of(toc: &'a Toc) -> Result<Self, IndexError> {
        let root = Node {
            parent: ROOT,
            name: "",
            origin: Origin::Implied,
            opaque: None,
            first_entry: 0,
        };
        let mut tree = Self {
            toc,
            nodes: vec![root],
            by_name: HashMap::new(),
            inode_node: Vec::new(),
        };
        let mut whiteouts = Vec::new();
        for (at, entry) in toc.entries.iter().enumerate() {
            if entry.kind != EntryType::Chunk {
                tree.add(at, &entry.name, &mut whiteouts)?;
            }
        }
        for (parent, name, at) in whiteouts {
            // A file beside its own whiteout is what the layer means to show; see docs/format.md.
            let node = tree.child(parent, name, at)?;
            if tree.nodes[node as usize].origin == Origin::Implied && tree.nodes[node as usize].first_entry == at {
                tree.nodes[node as usize].origin = Origin::Whiteout(at);
            }
        }
        tree.check_parents()?;
        tree.resolve_links()?;
        // Large, and no name is looked up any more.
        tree.by_name = HashMap::new();
        Ok(tree)
    }

    fn fault(&self, at: usize, fault: EntryFault) -> IndexError {
        IndexError::entry(at, &self.toc.entries[at].name, fault)
    }

    fn add(&mut self, at: usize, name: &'a str, whiteouts: &mut Vec<(u32, &'a str, u32)>) -> Result<(), IndexError> {
        let components = clean_path(name);
        self.check_path(at, &components)?;
        let entry = u32::try_from(at).map_err(|_| IndexError::TooManyInodes)?;
        let Some((base, parents)) = components.split_last() else {
            self.nodes[ROOT as usize].origin = Origin::Entry(entry);
            return Ok(());
        };
        if is_hidden(components[0]) || parents.iter().any(|name| name.starts_with(WHITEOUT_PREFIX)) {
            return Ok(());
        }
        let mut parent = ROOT;
        for name in parents {
            parent = self.child(parent, name, entry)?;
        }
        if *base == OPAQUE_MARK {
            self.nodes[parent as usize].opaque = Some(entry);
        } else if base.starts_with(WHITEOUT_META_PREFIX) {
            // Nothing that a container sees.
        } else if let Some(removed) = base.strip_prefix(WHITEOUT_PREFIX) {
            if matches!(removed, "" | "." | "..") {
                return Err(self.fault(at, EntryFault::Whiteout));
            }
            whiteouts.push((parent, removed, entry));
        } else {
            let node = self.child(parent, base, entry)?;
            self.nodes[node as usize].origin = Origin::Entry(entry);
        }
        Ok(())
    }

    fn check_path(&self, at: usize, components: &[&str]) -> Result<(), IndexError> {
        if components.len() > MAX_DEPTH {
            return Err(self.fault(at, EntryFault::TooDeep(components.len())));
        }
        for name in components {
            if name.len() > MAX_NAME_BYTES {
                return Err(self.fault(at, EntryFault::NameTooLong(name.len())));
            }
            if name.contains('\0') {
                return Err(self.fault(at, EntryFault::Nul { field: "name" }));
            }
        }
        Ok(())
    }

    /// The node of `name` in `parent`, new and implied if there was none.
    fn child(&mut self, parent: u32, name: &'a str, entry: u32) -> Result<u32, IndexError> {
        if let Some(node) = self.by_name.get(&(parent, name)) {
            return Ok(*node);
        }
        if self.nodes.len() >= MAX_INODES {
            return Err(IndexError::TooManyInodes);
        }
        let node = u32::try_from(self.nodes.len()).map_err(|_| IndexError::TooManyInodes)?;
        self.nodes.push(Node {
            parent,
            name,
            origin: Origin::Implied,
            opaque: None,
            first_entry: entry,
        });
        self.by_name.insert((parent, name), node);
        Ok(node)
    }

    /// Whether the node is a directory; hard links are not followed, a directory has one name.
    pub(super) fn is_dir(&self, node: u32) -> bool {
        match self.nodes[node as usize].origin {
            Origin::Entry(at) => self.toc.entries[at as usize].kind == EntryType::Dir,
            Origin::Implied => true,
            Origin::Whiteout(_) => false,
        }
    }

    /// Nothing may lie in what is not a directory, opaque marks included.
    fn check_parents(&self) -> Result<(), IndexError> {
        if let Origin::Entry(at) = self.nodes[ROOT as usize].origin
            && !self.is_dir(ROOT)
        {
            return Err(self.fault(at as usize, EntryFault::Root));
        }
        for (node, place) in (0..).zip(&self.nodes) {
            let at = match place.origin {
                Origin::Entry(at) | Origin::Whiteout(at) => at,
                Origin::Implied => place.first_entry,
            };
            self.check_directory(place.parent, at)?;
            if let Some(mark) = place.opaque {
                self.check_directory(node, mark)?;
            }
        }
        Ok(())
    }

    /// Entry `at` needs `dir` to be a directory.
    fn check_directory(&self, dir: u32, at: u32) -> Result<(), IndexError> {
        match self.nodes[dir as usize].origin {
            Origin::Entry(parent) | Origin::Whiteout(parent) if !self.is_dir(dir) => {
                let name = shortened(&self.toc.entries[parent as usize].name);
                let fault = EntryFault::ParentNotDirectory {
                    parent_entry: parent as usize,
                    parent: name,
                };
                Err(self.fault(at as usize, fault))
            }
            _ => Ok(()),
        }
    }

    /// The node that a hard link's target names.
    fn link_target(&self, at: usize) -> Result<u32, IndexError> {
        let target = &self.toc.entries[at].link_name;
        clean_path(target)
            .into_iter()
            .try_fold(ROOT, |parent, name| self.by_name.get(&(parent, name)).copied())
            .filter(|node| !matches!(self.nodes[*node as usize].origin, Origin::Whiteout(_)))
            .ok_or_else(|| self.fault(at, EntryFault::LinkTargetMissing(shortened(target))))
    }

    fn hardlink_entry(&self, node: u32) -> Option<usize> {
        match self.nodes[node as usize].origin {
            Origin::Entry(at) => Some(at as usize).filter(|at| self.toc.entries[*at].kind == EntryType::Hardlink),
            Origin::Implied | Origin::Whiteout(_) => None,
        }
    }

    /// Follows every chain of hard links once: a chain ends at a node already resolved, or at what is no link.
    fn resolve_links(&mut self) -> Result<(), IndexError> {
        const UNKNOWN: u32 = u32::MAX;
        const ON_CHAIN: u32 = u32::MAX - 1;
        let mut resolved = vec![UNKNOWN; self.nodes.len()];
        let mut chain = Vec::new();
        for start in 0..u32::try_from(self.nodes.len()).map_err(|_| IndexError::TooManyInodes)? {
            let mut node = start;
            while let Some(at) = self.hardlink_entry(node).filter(|_| resolved[node as usize] == UNKNOWN) {
                resolved[node as usize] = ON_CHAIN;
                chain.push(node);
                node = self.link_target(at)?;
                let target = || shortened(&self.toc.entries[at].link_name);
                if resolved[node as usize] == ON_CHAIN {
                    return Err(self.fault(at, EntryFault::LinkLoop(target())));
                }
                if self.is_dir(node) {
                    return Err(self.fault(at, EntryFault::LinkToDirectory(target())));
                }
            }
            let end = if resolved[node as usize] == UNKNOWN {
                node
            } else {
                resolved[node as usize]
            };
            resolved[node as usize] = end;
            for node in chain.drain(..) {
                resolved[node as usize] = end;
            }
        }
        self.inode_node = resolved;
        Ok(())
    }

    /// The nodes that have an inode of their own, in the order of their numbers: the root, then TOC order, then implied
    /// directories in the order in which the TOC first implied them.
    pub(super) fn numbered(&self) -> Vec<u32> {
        let mut nodes: Vec<u32> = (1..)
            .zip(self.inode_node.iter().skip(1))
            .filter(|(node, end)| node == *end)
            .map(|(node, _)| node)
            .collect();
        nodes.sort_unstable_by_key(|node| match self.nodes[*node as usize].origin {
            Origin::Entry(at) | Origin::Whiteout(at) => (false, at),
            Origin::Implied => (true, *node),
        });
        nodes.insert(0, ROOT);
        nodes
    }
}

/// Names in the root of a layer that belong to the format, not to the image.
fn is_hidden(first: &str) -> bool {
    [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK, TOC_TAR_NAME].contains(&first)
}

/// Where `.prefetch.landmark` lies in the blob, the last one if there are several.
pub(super) fn prefetch_end(toc: &Toc, toc_offset: u64) -> Result<Option<u64>, IndexError> {
    let landmark =
        toc.entries.iter().enumerate().rev().find(|(_, entry)| {
            entry.kind == EntryType::Reg && clean_path(&entry.name).as_slice() == [PREFETCH_LANDMARK]
        });
    let Some((at, entry)) = landmark else { return Ok(None) };
    if entry.offset >= toc_offset {
        let fault = EntryFault::Offset {
            offset: entry.offset,
            toc_offset,
        };
        return Err(IndexError::entry(at, &entry.name, fault));
    }
    Ok(Some(entry.offset))
}
