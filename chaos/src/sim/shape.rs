//! Shapes of networks that are in parts: who does not hear whom. Pure.

/// A shape of a network. Members stand in a row or in a circle, in the order that they are given in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Shape {
    /// Two sides that do not hear each other, and one in the middle that hears both.
    Bridge,
    /// Each hears its two neighbours alone: of five, each hears a majority, and no two the same one.
    Ring,
    /// As a ring that is open at one place: those at the ends hear one neighbour alone.
    Chain,
    /// The first is on its own.
    FirstAlone,
    /// The first hears nobody, and is heard by all.
    FirstDeaf,
    /// The first is heard by nobody, and hears all.
    FirstMute,
}

impl Shape {
    /// All of them.
    pub const ALL: &[Shape] = &[
        Shape::Bridge,
        Shape::Ring,
        Shape::Chain,
        Shape::FirstAlone,
        Shape::FirstDeaf,
        Shape::FirstMute,
    ];

    /// Whether one member has a place of its own, which is the first.
    pub(super) fn is_about_one(self) -> bool {
        match self {
            Self::Bridge | Self::Ring | Self::Chain => false,
            Self::FirstAlone | Self::FirstDeaf | Self::FirstMute => true,
        }
    }

    /// Who is not heard by whom: from, to.
    pub(super) fn cuts(self, members: &[u64]) -> Vec<(u64, u64)> {
        let count = members.len();
        let places = 0..count;
        let pairs = places.flat_map(|from| (0..count).map(move |to| (from, to)));
        pairs
            .filter(|(from, to)| from != to && !self.hears(*from, *to, count))
            .map(|(from, to)| (members[from], members[to]))
            .collect()
    }

    fn hears(self, from: usize, to: usize, count: usize) -> bool {
        let apart = from.abs_diff(to);
        let middle = count / 2;
        match self {
            Self::Bridge => from == middle || to == middle || (from < middle) == (to < middle),
            Self::Ring => apart == 1 || apart == count - 1,
            Self::Chain => apart == 1,
            Self::FirstAlone => from != 0 && to != 0,
            Self::FirstDeaf => to != 0,
            Self::FirstMute => from != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(shape: Shape, members: &[u64], expected: &[(u64, u64)]) {
        let mut cuts = shape.cuts(members);
        cuts.sort_unstable();
        assert_eq!(cuts, expected, "{shape:?}");
    }

    /// Both directions of each.
    fn both(pairs: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut all: Vec<_> = pairs.iter().flat_map(|(a, b)| [(*a, *b), (*b, *a)]).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn each_shape_cuts_what_its_name_says() {
        let five = [1, 2, 3, 4, 5];
        check(Shape::Bridge, &five, &both(&[(1, 4), (1, 5), (2, 4), (2, 5)]));
        check(Shape::Bridge, &[1, 2, 3], &both(&[(1, 3)]));
        check(
            Shape::Ring,
            &five,
            &both(&[(1, 3), (1, 4), (2, 4), (2, 5), (3, 5)]),
        );
        check(Shape::Ring, &[1, 2, 3], &[]);
        check(
            Shape::Chain,
            &five,
            &both(&[(1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5)]),
        );
        check(Shape::FirstAlone, &[2, 1, 3], &both(&[(1, 2), (2, 3)]));
        check(Shape::FirstDeaf, &[2, 1, 3], &[(1, 2), (3, 2)]);
        check(Shape::FirstMute, &[2, 1, 3], &[(2, 1), (2, 3)]);
    }
}
