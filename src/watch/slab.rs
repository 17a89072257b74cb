//! Numbered slots for values of one type.

use std::ops::{Index, IndexMut};

/// Position in a [`Slab`]; used again after its value is gone.
pub(super) type Slot = u32;

/// Slots of a page: growing by a page wastes less than doubling one vector, and copies nothing.
const PAGE: usize = 256;

#[derive(Debug)]
pub(super) struct Slab<T> {
    pages: Vec<Vec<Option<T>>>,
    free: Vec<Slot>,
    len: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { pages: Vec::new(), free: Vec::new(), len: 0 }
    }
}

impl<T> Slab<T> {
    pub fn insert(&mut self, value: T) -> Slot {
        self.len += 1;
        if let Some(slot) = self.free.pop() {
            *self.cell(slot) = Some(value);
            return slot;
        }
        if self.pages.last().is_none_or(|page| page.len() == PAGE) {
            self.pages.push(Vec::with_capacity(PAGE));
        }
        let before = (self.pages.len() - 1) * PAGE;
        let page = self.pages.last_mut().expect("a page with room was just ensured");
        page.push(Some(value));
        Slot::try_from(before + page.len() - 1).expect("memory ends before 2^32 slots")
    }

    pub fn remove(&mut self, slot: Slot) -> T {
        self.len -= 1;
        self.free.push(slot);
        self.cell(slot).take().expect(IN_USE)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Slots in use.
    pub fn slots(&self) -> Vec<Slot> {
        let all = self.pages.iter().flatten().zip(0..);
        all.filter_map(|(value, slot)| value.is_some().then_some(slot)).collect()
    }

    fn cell(&mut self, slot: Slot) -> &mut Option<T> {
        &mut self.pages[slot as usize / PAGE][slot as usize % PAGE]
    }
}

const IN_USE: &str = "only slots in use are named";

impl<T> Index<Slot> for Slab<T> {
    type Output = T;

    fn index(&self, slot: Slot) -> &T {
        self.pages[slot as usize / PAGE][slot as usize % PAGE].as_ref().expect(IN_USE)
    }
}

impl<T> IndexMut<Slot> for Slab<T> {
    fn index_mut(&mut self, slot: Slot) -> &mut T {
        self.cell(slot).as_mut().expect(IN_USE)
    }
}
