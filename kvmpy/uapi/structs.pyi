# SPDX-License-Identifier: Apache-2.0
# Written by `python -m kvmpy.gen`: do not edit.
# ruff: noqa: A002
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from kvmpy.uapi.struct_arrays import ByteArray as ByteArray
from kvmpy.uapi.struct_arrays import IntArray as IntArray
from kvmpy.uapi.struct_arrays import NestedArray as NestedArray
from kvmpy.uapi.struct_arrays import StructArray as StructArray
from kvmpy.uapi.struct_base import Field as Field
from kvmpy.uapi.struct_base import FlexStruct as FlexStruct
from kvmpy.uapi.struct_base import Struct as Struct

_S = TypeVar("_S", bound=Struct)

class _Nested(Generic[_S]):
    def __get__(self, obj: object, kind: Any = ...) -> _S: ...
    def __set__(self, obj: object, value: _S | Mapping[str, object]) -> None: ...

class _Structs(Generic[_S]):
    def __get__(self, obj: object, kind: Any = ...) -> StructArray[_S]: ...
    def __set__(self, obj: object, value: Iterable[_S | Mapping[str, object]]) -> None: ...

class _Ints:
    def __get__(self, obj: object, kind: Any = ...) -> IntArray: ...
    def __set__(self, obj: object, value: Iterable[int]) -> None: ...

class _Bytes:
    def __get__(self, obj: object, kind: Any = ...) -> ByteArray: ...
    def __set__(self, obj: object, value: Iterable[int]) -> None: ...

class _Rows:
    def __get__(self, obj: object, kind: Any = ...) -> NestedArray: ...
    def __set__(self, obj: object, value: Iterable[Iterable[int]]) -> None: ...

COUNTS: dict[str, str]
STRUCTS: dict[str, type[Struct]]
NESTED: dict[str, type[Struct]]

class kvm_clear_dirty_log(Struct):
    slot: int
    num_pages: int
    first_page: int
    dirty_bitmap: int
    padding2: int
    def __init__(
        self,
        *,
        slot: int = ...,
        num_pages: int = ...,
        first_page: int = ...,
        dirty_bitmap: int = ...,
        padding2: int = ...,
    ) -> None: ...

class kvm_clock_data(Struct):
    clock: int
    flags: int
    pad0: int
    realtime: int
    host_tsc: int
    pad: _Ints
    def __init__(
        self,
        *,
        clock: int = ...,
        flags: int = ...,
        pad0: int = ...,
        realtime: int = ...,
        host_tsc: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_clock_pairing(Struct):
    sec: int
    nsec: int
    tsc: int
    flags: int
    pad: _Ints
    def __init__(
        self,
        *,
        sec: int = ...,
        nsec: int = ...,
        tsc: int = ...,
        flags: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_coalesced_mmio(Struct):
    phys_addr: int
    len: int
    pad: int
    pio: int
    data: _Bytes
    def __init__(
        self,
        *,
        phys_addr: int = ...,
        len: int = ...,
        pad: int = ...,
        pio: int = ...,
        data: Iterable[int] = ...,
    ) -> None: ...

class kvm_coalesced_mmio_ring(FlexStruct):
    first: int
    last: int
    coalesced_mmio: _Structs[kvm_coalesced_mmio]
    def __init__(
        self,
        *,
        first: int = ...,
        last: int = ...,
        coalesced_mmio: Iterable[kvm_coalesced_mmio | Mapping[str, object]] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_coalesced_mmio]: ...

class kvm_coalesced_mmio_zone(Struct):
    addr: int
    size: int
    pad: int
    pio: int
    def __init__(
        self,
        *,
        addr: int = ...,
        size: int = ...,
        pad: int = ...,
        pio: int = ...,
    ) -> None: ...

class kvm_cpuid(FlexStruct):
    nent: int
    padding: int
    entries: _Structs[kvm_cpuid_entry]
    def __init__(
        self,
        *,
        nent: int = ...,
        padding: int = ...,
        entries: Iterable[kvm_cpuid_entry | Mapping[str, object]] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_cpuid_entry]: ...

class kvm_cpuid2(FlexStruct):
    nent: int
    padding: int
    entries: _Structs[kvm_cpuid_entry2]
    def __init__(
        self,
        *,
        nent: int = ...,
        padding: int = ...,
        entries: Iterable[kvm_cpuid_entry2 | Mapping[str, object]] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_cpuid_entry2]: ...

class kvm_cpuid_entry(Struct):
    function: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    padding: int
    def __init__(
        self,
        *,
        function: int = ...,
        eax: int = ...,
        ebx: int = ...,
        ecx: int = ...,
        edx: int = ...,
        padding: int = ...,
    ) -> None: ...

class kvm_cpuid_entry2(Struct):
    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    padding: _Ints
    def __init__(
        self,
        *,
        function: int = ...,
        index: int = ...,
        flags: int = ...,
        eax: int = ...,
        ebx: int = ...,
        ecx: int = ...,
        edx: int = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_create_device(Struct):
    type: int
    fd: int
    flags: int
    def __init__(
        self,
        *,
        type: int = ...,
        fd: int = ...,
        flags: int = ...,
    ) -> None: ...

class kvm_create_guest_memfd(Struct):
    size: int
    flags: int
    reserved: _Ints
    def __init__(
        self,
        *,
        size: int = ...,
        flags: int = ...,
        reserved: Iterable[int] = ...,
    ) -> None: ...

class kvm_debug_exit_arch(Struct):
    exception: int
    pad: int
    pc: int
    dr6: int
    dr7: int
    def __init__(
        self,
        *,
        exception: int = ...,
        pad: int = ...,
        pc: int = ...,
        dr6: int = ...,
        dr7: int = ...,
    ) -> None: ...

class kvm_debugregs(Struct):
    db: _Ints
    dr6: int
    dr7: int
    flags: int
    reserved: _Ints
    def __init__(
        self,
        *,
        db: Iterable[int] = ...,
        dr6: int = ...,
        dr7: int = ...,
        flags: int = ...,
        reserved: Iterable[int] = ...,
    ) -> None: ...

class kvm_device_attr(Struct):
    flags: int
    group: int
    attr: int
    addr: int
    def __init__(
        self,
        *,
        flags: int = ...,
        group: int = ...,
        attr: int = ...,
        addr: int = ...,
    ) -> None: ...

class kvm_dirty_gfn(Struct):
    flags: int
    slot: int
    offset: int
    def __init__(
        self,
        *,
        flags: int = ...,
        slot: int = ...,
        offset: int = ...,
    ) -> None: ...

class kvm_dirty_log(Struct):
    slot: int
    padding1: int
    dirty_bitmap: int
    padding2: int
    def __init__(
        self,
        *,
        slot: int = ...,
        padding1: int = ...,
        dirty_bitmap: int = ...,
        padding2: int = ...,
    ) -> None: ...

class kvm_dtable(Struct):
    base: int
    limit: int
    padding: _Ints
    def __init__(
        self,
        *,
        base: int = ...,
        limit: int = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_enable_cap(Struct):
    cap: int
    flags: int
    args: _Ints
    pad: _Bytes
    def __init__(
        self,
        *,
        cap: int = ...,
        flags: int = ...,
        args: Iterable[int] = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_enc_region(Struct):
    addr: int
    size: int
    def __init__(
        self,
        *,
        addr: int = ...,
        size: int = ...,
    ) -> None: ...

class kvm_exit_snp_req_certs(Struct):
    gpa: int
    npages: int
    ret: int
    def __init__(
        self,
        *,
        gpa: int = ...,
        npages: int = ...,
        ret: int = ...,
    ) -> None: ...

class kvm_fpu(Struct):
    fpr: _Rows
    fcw: int
    fsw: int
    ftwx: int
    pad1: int
    last_opcode: int
    last_ip: int
    last_dp: int
    xmm: _Rows
    mxcsr: int
    pad2: int
    def __init__(
        self,
        *,
        fpr: Iterable[Iterable[int]] = ...,
        fcw: int = ...,
        fsw: int = ...,
        ftwx: int = ...,
        pad1: int = ...,
        last_opcode: int = ...,
        last_ip: int = ...,
        last_dp: int = ...,
        xmm: Iterable[Iterable[int]] = ...,
        mxcsr: int = ...,
        pad2: int = ...,
    ) -> None: ...

class kvm_guest_debug(Struct):
    control: int
    pad: int
    arch: _Nested[kvm_guest_debug_arch]
    def __init__(
        self,
        *,
        control: int = ...,
        pad: int = ...,
        arch: kvm_guest_debug_arch | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_guest_debug_arch(Struct):
    debugreg: _Ints
    def __init__(
        self,
        *,
        debugreg: Iterable[int] = ...,
    ) -> None: ...

class kvm_hyperv_eventfd(Struct):
    conn_id: int
    fd: int
    flags: int
    padding: _Ints
    def __init__(
        self,
        *,
        conn_id: int = ...,
        fd: int = ...,
        flags: int = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_hyperv_exit(Struct):
    type: int
    pad1: int
    u: _Nested[kvm_hyperv_exit__u]
    def __init__(
        self,
        *,
        type: int = ...,
        pad1: int = ...,
        u: kvm_hyperv_exit__u | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_hyperv_exit__u(Struct):
    synic: _Nested[kvm_hyperv_exit__u__synic]
    hcall: _Nested[kvm_hyperv_exit__u__hcall]
    syndbg: _Nested[kvm_hyperv_exit__u__syndbg]
    def __init__(
        self,
        *,
        synic: kvm_hyperv_exit__u__synic | Mapping[str, object] = ...,
        hcall: kvm_hyperv_exit__u__hcall | Mapping[str, object] = ...,
        syndbg: kvm_hyperv_exit__u__syndbg | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_hyperv_exit__u__hcall(Struct):
    input: int
    result: int
    params: _Ints
    def __init__(
        self,
        *,
        input: int = ...,
        result: int = ...,
        params: Iterable[int] = ...,
    ) -> None: ...

class kvm_hyperv_exit__u__syndbg(Struct):
    msr: int
    pad2: int
    control: int
    status: int
    send_page: int
    recv_page: int
    pending_page: int
    def __init__(
        self,
        *,
        msr: int = ...,
        pad2: int = ...,
        control: int = ...,
        status: int = ...,
        send_page: int = ...,
        recv_page: int = ...,
        pending_page: int = ...,
    ) -> None: ...

class kvm_hyperv_exit__u__synic(Struct):
    msr: int
    pad2: int
    control: int
    evt_page: int
    msg_page: int
    def __init__(
        self,
        *,
        msr: int = ...,
        pad2: int = ...,
        control: int = ...,
        evt_page: int = ...,
        msg_page: int = ...,
    ) -> None: ...

class kvm_interrupt(Struct):
    irq: int
    def __init__(
        self,
        *,
        irq: int = ...,
    ) -> None: ...

class kvm_ioapic_state(Struct):
    base_address: int
    ioregsel: int
    id: int
    irr: int
    pad: int
    redirtbl: _Structs[kvm_ioapic_state__redirtbl]
    def __init__(
        self,
        *,
        base_address: int = ...,
        ioregsel: int = ...,
        id: int = ...,
        irr: int = ...,
        pad: int = ...,
        redirtbl: Iterable[kvm_ioapic_state__redirtbl | Mapping[str, object]] = ...,
    ) -> None: ...

class kvm_ioapic_state__redirtbl(Struct):
    bits: int
    fields: _Nested[kvm_ioapic_state__redirtbl__fields]  # type: ignore[assignment]
    def __init__(
        self,
        *,
        bits: int = ...,
        fields: kvm_ioapic_state__redirtbl__fields | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_ioapic_state__redirtbl__fields(Struct):
    vector: int
    delivery_mode: int
    dest_mode: int
    delivery_status: int
    polarity: int
    remote_irr: int
    trig_mode: int
    mask: int
    reserve: int
    reserved: _Bytes
    dest_id: int
    def __init__(
        self,
        *,
        vector: int = ...,
        delivery_mode: int = ...,
        dest_mode: int = ...,
        delivery_status: int = ...,
        polarity: int = ...,
        remote_irr: int = ...,
        trig_mode: int = ...,
        mask: int = ...,
        reserve: int = ...,
        reserved: Iterable[int] = ...,
        dest_id: int = ...,
    ) -> None: ...

class kvm_ioeventfd(Struct):
    datamatch: int
    addr: int
    len: int
    fd: int
    flags: int
    pad: _Bytes
    def __init__(
        self,
        *,
        datamatch: int = ...,
        addr: int = ...,
        len: int = ...,
        fd: int = ...,
        flags: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_irq_level(Struct):
    irq: int
    status: int
    level: int
    def __init__(
        self,
        *,
        irq: int = ...,
        status: int = ...,
        level: int = ...,
    ) -> None: ...

class kvm_irq_routing(FlexStruct):
    nr: int
    flags: int
    entries: _Structs[kvm_irq_routing_entry]
    def __init__(
        self,
        *,
        nr: int = ...,
        flags: int = ...,
        entries: Iterable[kvm_irq_routing_entry | Mapping[str, object]] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_irq_routing_entry]: ...

class kvm_irq_routing_entry(Struct):
    gsi: int
    type: int
    flags: int
    pad: int
    u: _Nested[kvm_irq_routing_entry__u]
    def __init__(
        self,
        *,
        gsi: int = ...,
        type: int = ...,
        flags: int = ...,
        pad: int = ...,
        u: kvm_irq_routing_entry__u | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_irq_routing_entry__u(Struct):
    irqchip: _Nested[kvm_irq_routing_irqchip]
    msi: _Nested[kvm_irq_routing_msi]
    adapter: _Nested[kvm_irq_routing_s390_adapter]
    hv_sint: _Nested[kvm_irq_routing_hv_sint]
    xen_evtchn: _Nested[kvm_irq_routing_xen_evtchn]
    pad: _Ints
    def __init__(
        self,
        *,
        irqchip: kvm_irq_routing_irqchip | Mapping[str, object] = ...,
        msi: kvm_irq_routing_msi | Mapping[str, object] = ...,
        adapter: kvm_irq_routing_s390_adapter | Mapping[str, object] = ...,
        hv_sint: kvm_irq_routing_hv_sint | Mapping[str, object] = ...,
        xen_evtchn: kvm_irq_routing_xen_evtchn | Mapping[str, object] = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_irq_routing_hv_sint(Struct):
    vcpu: int
    sint: int
    def __init__(
        self,
        *,
        vcpu: int = ...,
        sint: int = ...,
    ) -> None: ...

class kvm_irq_routing_irqchip(Struct):
    irqchip: int
    pin: int
    def __init__(
        self,
        *,
        irqchip: int = ...,
        pin: int = ...,
    ) -> None: ...

class kvm_irq_routing_msi(Struct):
    address_lo: int
    address_hi: int
    data: int
    pad: int
    devid: int
    def __init__(
        self,
        *,
        address_lo: int = ...,
        address_hi: int = ...,
        data: int = ...,
        pad: int = ...,
        devid: int = ...,
    ) -> None: ...

class kvm_irq_routing_s390_adapter(Struct):
    ind_addr: int
    summary_addr: int
    ind_offset: int
    summary_offset: int
    adapter_id: int
    def __init__(
        self,
        *,
        ind_addr: int = ...,
        summary_addr: int = ...,
        ind_offset: int = ...,
        summary_offset: int = ...,
        adapter_id: int = ...,
    ) -> None: ...

class kvm_irq_routing_xen_evtchn(Struct):
    port: int
    vcpu: int
    priority: int
    def __init__(
        self,
        *,
        port: int = ...,
        vcpu: int = ...,
        priority: int = ...,
    ) -> None: ...

class kvm_irqchip(Struct):
    chip_id: int
    pad: int
    chip: _Nested[kvm_irqchip__chip]
    def __init__(
        self,
        *,
        chip_id: int = ...,
        pad: int = ...,
        chip: kvm_irqchip__chip | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_irqchip__chip(Struct):
    dummy: _Bytes
    pic: _Nested[kvm_pic_state]
    ioapic: _Nested[kvm_ioapic_state]
    def __init__(
        self,
        *,
        dummy: Iterable[int] = ...,
        pic: kvm_pic_state | Mapping[str, object] = ...,
        ioapic: kvm_ioapic_state | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_irqfd(Struct):
    fd: int
    gsi: int
    flags: int
    resamplefd: int
    pad: _Bytes
    def __init__(
        self,
        *,
        fd: int = ...,
        gsi: int = ...,
        flags: int = ...,
        resamplefd: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_lapic_state(Struct):
    regs: _Bytes
    def __init__(
        self,
        *,
        regs: Iterable[int] = ...,
    ) -> None: ...

class kvm_memory_attributes(Struct):
    address: int
    size: int
    attributes: int
    flags: int
    def __init__(
        self,
        *,
        address: int = ...,
        size: int = ...,
        attributes: int = ...,
        flags: int = ...,
    ) -> None: ...

class kvm_mmu_op_flush_tlb(Struct):
    header: _Nested[kvm_mmu_op_header]
    def __init__(
        self,
        *,
        header: kvm_mmu_op_header | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_mmu_op_header(Struct):
    op: int
    pad: int
    def __init__(
        self,
        *,
        op: int = ...,
        pad: int = ...,
    ) -> None: ...

class kvm_mmu_op_release_pt(Struct):
    header: _Nested[kvm_mmu_op_header]
    pt_phys: int
    def __init__(
        self,
        *,
        header: kvm_mmu_op_header | Mapping[str, object] = ...,
        pt_phys: int = ...,
    ) -> None: ...

class kvm_mmu_op_write_pte(Struct):
    header: _Nested[kvm_mmu_op_header]
    pte_phys: int
    pte_val: int
    def __init__(
        self,
        *,
        header: kvm_mmu_op_header | Mapping[str, object] = ...,
        pte_phys: int = ...,
        pte_val: int = ...,
    ) -> None: ...

class kvm_mp_state(Struct):
    mp_state: int
    def __init__(
        self,
        *,
        mp_state: int = ...,
    ) -> None: ...

class kvm_msi(Struct):
    address_lo: int
    address_hi: int
    data: int
    flags: int
    devid: int
    pad: _Bytes
    def __init__(
        self,
        *,
        address_lo: int = ...,
        address_hi: int = ...,
        data: int = ...,
        flags: int = ...,
        devid: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_msr_entry(Struct):
    index: int
    reserved: int
    data: int
    def __init__(
        self,
        *,
        index: int = ...,
        reserved: int = ...,
        data: int = ...,
    ) -> None: ...

class kvm_msr_filter(Struct):
    flags: int
    ranges: _Structs[kvm_msr_filter_range]
    def __init__(
        self,
        *,
        flags: int = ...,
        ranges: Iterable[kvm_msr_filter_range | Mapping[str, object]] = ...,
    ) -> None: ...

class kvm_msr_filter_range(Struct):
    flags: int
    nmsrs: int
    base: int
    bitmap: int
    def __init__(
        self,
        *,
        flags: int = ...,
        nmsrs: int = ...,
        base: int = ...,
        bitmap: int = ...,
    ) -> None: ...

class kvm_msr_list(FlexStruct):
    nmsrs: int
    indices: _Ints
    def __init__(
        self,
        *,
        nmsrs: int = ...,
        indices: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class kvm_msrs(FlexStruct):
    nmsrs: int
    pad: int
    entries: _Structs[kvm_msr_entry]
    def __init__(
        self,
        *,
        nmsrs: int = ...,
        pad: int = ...,
        entries: Iterable[kvm_msr_entry | Mapping[str, object]] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_msr_entry]: ...

class kvm_nested_state(FlexStruct):
    flags: int
    format: int
    size: int
    hdr: _Nested[kvm_nested_state__hdr]
    data: _Bytes
    def __init__(
        self,
        *,
        flags: int = ...,
        format: int = ...,
        size: int = ...,
        hdr: kvm_nested_state__hdr | Mapping[str, object] = ...,
        data: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class kvm_nested_state__hdr(Struct):
    vmx: _Nested[kvm_vmx_nested_state_hdr]
    svm: _Nested[kvm_svm_nested_state_hdr]
    pad: _Bytes
    def __init__(
        self,
        *,
        vmx: kvm_vmx_nested_state_hdr | Mapping[str, object] = ...,
        svm: kvm_svm_nested_state_hdr | Mapping[str, object] = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_one_reg(Struct):
    id: int
    addr: int
    def __init__(
        self,
        *,
        id: int = ...,
        addr: int = ...,
    ) -> None: ...

class kvm_pic_state(Struct):
    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int
    def __init__(
        self,
        *,
        last_irr: int = ...,
        irr: int = ...,
        imr: int = ...,
        isr: int = ...,
        priority_add: int = ...,
        irq_base: int = ...,
        read_reg_select: int = ...,
        poll: int = ...,
        special_mask: int = ...,
        init_state: int = ...,
        auto_eoi: int = ...,
        rotate_on_auto_eoi: int = ...,
        special_fully_nested_mode: int = ...,
        init4: int = ...,
        elcr: int = ...,
        elcr_mask: int = ...,
    ) -> None: ...

class kvm_pit_channel_state(Struct):
    count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int
    count_load_time: int
    def __init__(
        self,
        *,
        count: int = ...,
        latched_count: int = ...,
        count_latched: int = ...,
        status_latched: int = ...,
        status: int = ...,
        read_state: int = ...,
        write_state: int = ...,
        write_latch: int = ...,
        rw_mode: int = ...,
        mode: int = ...,
        bcd: int = ...,
        gate: int = ...,
        count_load_time: int = ...,
    ) -> None: ...

class kvm_pit_config(Struct):
    flags: int
    pad: _Ints
    def __init__(
        self,
        *,
        flags: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_pit_state(Struct):
    channels: _Structs[kvm_pit_channel_state]
    def __init__(
        self,
        *,
        channels: Iterable[kvm_pit_channel_state | Mapping[str, object]] = ...,
    ) -> None: ...

class kvm_pit_state2(Struct):
    channels: _Structs[kvm_pit_channel_state]
    flags: int
    reserved: _Ints
    def __init__(
        self,
        *,
        channels: Iterable[kvm_pit_channel_state | Mapping[str, object]] = ...,
        flags: int = ...,
        reserved: Iterable[int] = ...,
    ) -> None: ...

class kvm_pmu_event_filter(FlexStruct):
    action: int
    nevents: int
    fixed_counter_bitmap: int
    flags: int
    pad: _Ints
    events: _Ints
    def __init__(
        self,
        *,
        action: int = ...,
        nevents: int = ...,
        fixed_counter_bitmap: int = ...,
        flags: int = ...,
        pad: Iterable[int] = ...,
        events: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class kvm_pre_fault_memory(Struct):
    gpa: int
    size: int
    flags: int
    padding: _Ints
    def __init__(
        self,
        *,
        gpa: int = ...,
        size: int = ...,
        flags: int = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_reg_list(FlexStruct):
    n: int
    reg: _Ints
    def __init__(
        self,
        *,
        n: int = ...,
        reg: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class kvm_regs(Struct):
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int
    def __init__(
        self,
        *,
        rax: int = ...,
        rbx: int = ...,
        rcx: int = ...,
        rdx: int = ...,
        rsi: int = ...,
        rdi: int = ...,
        rsp: int = ...,
        rbp: int = ...,
        r8: int = ...,
        r9: int = ...,
        r10: int = ...,
        r11: int = ...,
        r12: int = ...,
        r13: int = ...,
        r14: int = ...,
        r15: int = ...,
        rip: int = ...,
        rflags: int = ...,
    ) -> None: ...

class kvm_reinject_control(Struct):
    pit_reinject: int
    reserved: _Bytes
    def __init__(
        self,
        *,
        pit_reinject: int = ...,
        reserved: Iterable[int] = ...,
    ) -> None: ...

class kvm_run(Struct):
    request_interrupt_window: int
    immediate_exit: int
    padding1: _Bytes
    exit_reason: int
    ready_for_interrupt_injection: int
    if_flag: int
    flags: int
    cr8: int
    apic_base: int
    hw: _Nested[kvm_run__hw]
    fail_entry: _Nested[kvm_run__fail_entry]
    ex: _Nested[kvm_run__ex]
    io: _Nested[kvm_run__io]
    debug: _Nested[kvm_run__debug]
    mmio: _Nested[kvm_run__mmio]
    iocsr_io: _Nested[kvm_run__iocsr_io]
    hypercall: _Nested[kvm_run__hypercall]
    tpr_access: _Nested[kvm_run__tpr_access]
    s390_sieic: _Nested[kvm_run__s390_sieic]
    s390_reset_flags: int
    s390_ucontrol: _Nested[kvm_run__s390_ucontrol]
    dcr: _Nested[kvm_run__dcr]
    internal: _Nested[kvm_run__internal]
    emulation_failure: _Nested[kvm_run__emulation_failure]
    osi: _Nested[kvm_run__osi]
    papr_hcall: _Nested[kvm_run__papr_hcall]
    s390_tsch: _Nested[kvm_run__s390_tsch]
    epr: _Nested[kvm_run__epr]
    system_event: _Nested[kvm_run__system_event]
    s390_stsi: _Nested[kvm_run__s390_stsi]
    eoi: _Nested[kvm_run__eoi]
    hyperv: _Nested[kvm_hyperv_exit]
    arm_nisv: _Nested[kvm_run__arm_nisv]
    msr: _Nested[kvm_run__msr]
    xen: _Nested[kvm_xen_exit]
    riscv_sbi: _Nested[kvm_run__riscv_sbi]
    riscv_csr: _Nested[kvm_run__riscv_csr]
    notify: _Nested[kvm_run__notify]
    memory_fault: _Nested[kvm_run__memory_fault]
    tdx: _Nested[kvm_run__tdx]
    arm_sea: _Nested[kvm_run__arm_sea]
    snp_req_certs: _Nested[kvm_exit_snp_req_certs]
    padding: _Bytes
    kvm_valid_regs: int
    kvm_dirty_regs: int
    s: _Nested[kvm_run__s]
    def __init__(
        self,
        *,
        request_interrupt_window: int = ...,
        immediate_exit: int = ...,
        padding1: Iterable[int] = ...,
        exit_reason: int = ...,
        ready_for_interrupt_injection: int = ...,
        if_flag: int = ...,
        flags: int = ...,
        cr8: int = ...,
        apic_base: int = ...,
        hw: kvm_run__hw | Mapping[str, object] = ...,
        fail_entry: kvm_run__fail_entry | Mapping[str, object] = ...,
        ex: kvm_run__ex | Mapping[str, object] = ...,
        io: kvm_run__io | Mapping[str, object] = ...,
        debug: kvm_run__debug | Mapping[str, object] = ...,
        mmio: kvm_run__mmio | Mapping[str, object] = ...,
        iocsr_io: kvm_run__iocsr_io | Mapping[str, object] = ...,
        hypercall: kvm_run__hypercall | Mapping[str, object] = ...,
        tpr_access: kvm_run__tpr_access | Mapping[str, object] = ...,
        s390_sieic: kvm_run__s390_sieic | Mapping[str, object] = ...,
        s390_reset_flags: int = ...,
        s390_ucontrol: kvm_run__s390_ucontrol | Mapping[str, object] = ...,
        dcr: kvm_run__dcr | Mapping[str, object] = ...,
        internal: kvm_run__internal | Mapping[str, object] = ...,
        emulation_failure: kvm_run__emulation_failure | Mapping[str, object] = ...,
        osi: kvm_run__osi | Mapping[str, object] = ...,
        papr_hcall: kvm_run__papr_hcall | Mapping[str, object] = ...,
        s390_tsch: kvm_run__s390_tsch | Mapping[str, object] = ...,
        epr: kvm_run__epr | Mapping[str, object] = ...,
        system_event: kvm_run__system_event | Mapping[str, object] = ...,
        s390_stsi: kvm_run__s390_stsi | Mapping[str, object] = ...,
        eoi: kvm_run__eoi | Mapping[str, object] = ...,
        hyperv: kvm_hyperv_exit | Mapping[str, object] = ...,
        arm_nisv: kvm_run__arm_nisv | Mapping[str, object] = ...,
        msr: kvm_run__msr | Mapping[str, object] = ...,
        xen: kvm_xen_exit | Mapping[str, object] = ...,
        riscv_sbi: kvm_run__riscv_sbi | Mapping[str, object] = ...,
        riscv_csr: kvm_run__riscv_csr | Mapping[str, object] = ...,
        notify: kvm_run__notify | Mapping[str, object] = ...,
        memory_fault: kvm_run__memory_fault | Mapping[str, object] = ...,
        tdx: kvm_run__tdx | Mapping[str, object] = ...,
        arm_sea: kvm_run__arm_sea | Mapping[str, object] = ...,
        snp_req_certs: kvm_exit_snp_req_certs | Mapping[str, object] = ...,
        padding: Iterable[int] = ...,
        kvm_valid_regs: int = ...,
        kvm_dirty_regs: int = ...,
        s: kvm_run__s | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_run__arm_nisv(Struct):
    esr_iss: int
    fault_ipa: int
    def __init__(
        self,
        *,
        esr_iss: int = ...,
        fault_ipa: int = ...,
    ) -> None: ...

class kvm_run__arm_sea(Struct):
    flags: int
    esr: int
    gva: int
    gpa: int
    def __init__(
        self,
        *,
        flags: int = ...,
        esr: int = ...,
        gva: int = ...,
        gpa: int = ...,
    ) -> None: ...

class kvm_run__dcr(Struct):
    dcrn: int
    data: int
    is_write: int
    def __init__(
        self,
        *,
        dcrn: int = ...,
        data: int = ...,
        is_write: int = ...,
    ) -> None: ...

class kvm_run__debug(Struct):
    arch: _Nested[kvm_debug_exit_arch]
    def __init__(
        self,
        *,
        arch: kvm_debug_exit_arch | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_run__emulation_failure(Struct):
    suberror: int
    ndata: int
    flags: int
    insn_size: int
    insn_bytes: _Bytes
    def __init__(
        self,
        *,
        suberror: int = ...,
        ndata: int = ...,
        flags: int = ...,
        insn_size: int = ...,
        insn_bytes: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__eoi(Struct):
    vector: int
    def __init__(
        self,
        *,
        vector: int = ...,
    ) -> None: ...

class kvm_run__epr(Struct):
    epr: int
    def __init__(
        self,
        *,
        epr: int = ...,
    ) -> None: ...

class kvm_run__ex(Struct):
    exception: int
    error_code: int
    def __init__(
        self,
        *,
        exception: int = ...,
        error_code: int = ...,
    ) -> None: ...

class kvm_run__fail_entry(Struct):
    hardware_entry_failure_reason: int
    cpu: int
    def __init__(
        self,
        *,
        hardware_entry_failure_reason: int = ...,
        cpu: int = ...,
    ) -> None: ...

class kvm_run__hw(Struct):
    hardware_exit_reason: int
    def __init__(
        self,
        *,
        hardware_exit_reason: int = ...,
    ) -> None: ...

class kvm_run__hypercall(Struct):
    nr: int
    args: _Ints
    ret: int
    longmode: int
    flags: int
    def __init__(
        self,
        *,
        nr: int = ...,
        args: Iterable[int] = ...,
        ret: int = ...,
        longmode: int = ...,
        flags: int = ...,
    ) -> None: ...

class kvm_run__internal(Struct):
    suberror: int
    ndata: int
    data: _Ints
    def __init__(
        self,
        *,
        suberror: int = ...,
        ndata: int = ...,
        data: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__io(Struct):
    direction: int
    size: int
    port: int
    count: int
    data_offset: int
    def __init__(
        self,
        *,
        direction: int = ...,
        size: int = ...,
        port: int = ...,
        count: int = ...,
        data_offset: int = ...,
    ) -> None: ...

class kvm_run__iocsr_io(Struct):
    phys_addr: int
    data: _Bytes
    len: int
    is_write: int
    def __init__(
        self,
        *,
        phys_addr: int = ...,
        data: Iterable[int] = ...,
        len: int = ...,
        is_write: int = ...,
    ) -> None: ...

class kvm_run__memory_fault(Struct):
    flags: int
    gpa: int
    size: int
    def __init__(
        self,
        *,
        flags: int = ...,
        gpa: int = ...,
        size: int = ...,
    ) -> None: ...

class kvm_run__mmio(Struct):
    phys_addr: int
    data: _Bytes
    len: int
    is_write: int
    def __init__(
        self,
        *,
        phys_addr: int = ...,
        data: Iterable[int] = ...,
        len: int = ...,
        is_write: int = ...,
    ) -> None: ...

class kvm_run__msr(Struct):
    error: int
    pad: _Bytes
    reason: int
    index: int
    data: int
    def __init__(
        self,
        *,
        error: int = ...,
        pad: Iterable[int] = ...,
        reason: int = ...,
        index: int = ...,
        data: int = ...,
    ) -> None: ...

class kvm_run__notify(Struct):
    flags: int
    def __init__(
        self,
        *,
        flags: int = ...,
    ) -> None: ...

class kvm_run__osi(Struct):
    gprs: _Ints
    def __init__(
        self,
        *,
        gprs: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__papr_hcall(Struct):
    nr: int
    ret: int
    args: _Ints
    def __init__(
        self,
        *,
        nr: int = ...,
        ret: int = ...,
        args: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__riscv_csr(Struct):
    csr_num: int
    new_value: int
    write_mask: int
    ret_value: int
    def __init__(
        self,
        *,
        csr_num: int = ...,
        new_value: int = ...,
        write_mask: int = ...,
        ret_value: int = ...,
    ) -> None: ...

class kvm_run__riscv_sbi(Struct):
    extension_id: int
    function_id: int
    args: _Ints
    ret: _Ints
    def __init__(
        self,
        *,
        extension_id: int = ...,
        function_id: int = ...,
        args: Iterable[int] = ...,
        ret: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__s(Struct):
    regs: _Nested[kvm_sync_regs]
    padding: _Bytes
    def __init__(
        self,
        *,
        regs: kvm_sync_regs | Mapping[str, object] = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__s390_sieic(Struct):
    icptcode: int
    ipa: int
    ipb: int
    def __init__(
        self,
        *,
        icptcode: int = ...,
        ipa: int = ...,
        ipb: int = ...,
    ) -> None: ...

class kvm_run__s390_stsi(Struct):
    addr: int
    ar: int
    reserved: int
    fc: int
    sel1: int
    sel2: int
    def __init__(
        self,
        *,
        addr: int = ...,
        ar: int = ...,
        reserved: int = ...,
        fc: int = ...,
        sel1: int = ...,
        sel2: int = ...,
    ) -> None: ...

class kvm_run__s390_tsch(Struct):
    subchannel_id: int
    subchannel_nr: int
    io_int_parm: int
    io_int_word: int
    ipb: int
    dequeued: int
    def __init__(
        self,
        *,
        subchannel_id: int = ...,
        subchannel_nr: int = ...,
        io_int_parm: int = ...,
        io_int_word: int = ...,
        ipb: int = ...,
        dequeued: int = ...,
    ) -> None: ...

class kvm_run__s390_ucontrol(Struct):
    trans_exc_code: int
    pgm_code: int
    def __init__(
        self,
        *,
        trans_exc_code: int = ...,
        pgm_code: int = ...,
    ) -> None: ...

class kvm_run__system_event(Struct):
    type: int
    ndata: int
    flags: int
    data: _Ints
    def __init__(
        self,
        *,
        type: int = ...,
        ndata: int = ...,
        flags: int = ...,
        data: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__tdx(Struct):
    flags: int
    nr: int
    unknown: _Nested[kvm_run__tdx__unknown]
    get_quote: _Nested[kvm_run__tdx__get_quote]
    get_tdvmcall_info: _Nested[kvm_run__tdx__get_tdvmcall_info]
    setup_event_notify: _Nested[kvm_run__tdx__setup_event_notify]
    def __init__(
        self,
        *,
        flags: int = ...,
        nr: int = ...,
        unknown: kvm_run__tdx__unknown | Mapping[str, object] = ...,
        get_quote: kvm_run__tdx__get_quote | Mapping[str, object] = ...,
        get_tdvmcall_info: kvm_run__tdx__get_tdvmcall_info | Mapping[str, object] = ...,
        setup_event_notify: kvm_run__tdx__setup_event_notify | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_run__tdx__get_quote(Struct):
    ret: int
    gpa: int
    size: int
    def __init__(
        self,
        *,
        ret: int = ...,
        gpa: int = ...,
        size: int = ...,
    ) -> None: ...

class kvm_run__tdx__get_tdvmcall_info(Struct):
    ret: int
    leaf: int
    r11: int
    r12: int
    r13: int
    r14: int
    def __init__(
        self,
        *,
        ret: int = ...,
        leaf: int = ...,
        r11: int = ...,
        r12: int = ...,
        r13: int = ...,
        r14: int = ...,
    ) -> None: ...

class kvm_run__tdx__setup_event_notify(Struct):
    ret: int
    vector: int
    def __init__(
        self,
        *,
        ret: int = ...,
        vector: int = ...,
    ) -> None: ...

class kvm_run__tdx__unknown(Struct):
    ret: int
    data: _Ints
    def __init__(
        self,
        *,
        ret: int = ...,
        data: Iterable[int] = ...,
    ) -> None: ...

class kvm_run__tpr_access(Struct):
    rip: int
    is_write: int
    pad: int
    def __init__(
        self,
        *,
        rip: int = ...,
        is_write: int = ...,
        pad: int = ...,
    ) -> None: ...

class kvm_segment(Struct):
    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int
    g: int
    avl: int
    unusable: int
    padding: int
    def __init__(
        self,
        *,
        base: int = ...,
        limit: int = ...,
        selector: int = ...,
        type: int = ...,
        present: int = ...,
        dpl: int = ...,
        db: int = ...,
        s: int = ...,
        l: int = ...,
        g: int = ...,
        avl: int = ...,
        unusable: int = ...,
        padding: int = ...,
    ) -> None: ...

class kvm_sev_attestation_report(Struct):
    mnonce: _Bytes
    uaddr: int
    len: int
    pad0: int
    def __init__(
        self,
        *,
        mnonce: Iterable[int] = ...,
        uaddr: int = ...,
        len: int = ...,
        pad0: int = ...,
    ) -> None: ...

class kvm_sev_cmd(Struct):
    id: int
    pad0: int
    data: int
    error: int
    sev_fd: int
    def __init__(
        self,
        *,
        id: int = ...,
        pad0: int = ...,
        data: int = ...,
        error: int = ...,
        sev_fd: int = ...,
    ) -> None: ...

class kvm_sev_dbg(Struct):
    src_uaddr: int
    dst_uaddr: int
    len: int
    pad0: int
    def __init__(
        self,
        *,
        src_uaddr: int = ...,
        dst_uaddr: int = ...,
        len: int = ...,
        pad0: int = ...,
    ) -> None: ...

class kvm_sev_guest_status(Struct):
    handle: int
    policy: int
    state: int
    def __init__(
        self,
        *,
        handle: int = ...,
        policy: int = ...,
        state: int = ...,
    ) -> None: ...

class kvm_sev_init(Struct):
    vmsa_features: int
    flags: int
    ghcb_version: int
    pad1: int
    pad2: _Ints
    def __init__(
        self,
        *,
        vmsa_features: int = ...,
        flags: int = ...,
        ghcb_version: int = ...,
        pad1: int = ...,
        pad2: Iterable[int] = ...,
    ) -> None: ...

class kvm_sev_launch_measure(Struct):
    uaddr: int
    len: int
    pad0: int
    def __init__(
        self,
        *,
        uaddr: int = ...,
        len: int = ...,
        pad0: int = ...,
    ) -> None: ...

class kvm_sev_launch_secret(Struct):
    hdr_uaddr: int
    hdr_len: int
    pad0: int
    guest_uaddr: int
    guest_len: int
    pad1: int
    trans_uaddr: int
    trans_len: int
    pad2: int
    def __init__(
        self,
        *,
        hdr_uaddr: int = ...,
        hdr_len: int = ...,
        pad0: int = ...,
        guest_uaddr: int = ...,
        guest_len: int = ...,
        pad1: int = ...,
        trans_uaddr: int = ...,
        trans_len: int = ...,
        pad2: int = ...,
    ) -> None: ...

class kvm_sev_launch_start(Struct):
    handle: int
    policy: int
    dh_uaddr: int
    dh_len: int
    pad0: int
    session_uaddr: int
    session_len: int
    pad1: int
    def __init__(
        self,
        *,
        handle: int = ...,
        policy: int = ...,
        dh_uaddr: int = ...,
        dh_len: int = ...,
        pad0: int = ...,
        session_uaddr: int = ...,
        session_len: int = ...,
        pad1: int = ...,
    ) -> None: ...

class kvm_sev_launch_update_data(Struct):
    uaddr: int
    len: int
    pad0: int
    def __init__(
        self,
        *,
        uaddr: int = ...,
        len: int = ...,
        pad0: int = ...,
    ) -> None: ...

class kvm_sev_receive_start(Struct):
    handle: int
    policy: int
    pdh_uaddr: int
    pdh_len: int
    pad0: int
    session_uaddr: int
    session_len: int
    pad1: int
    def __init__(
        self,
        *,
        handle: int = ...,
        policy: int = ...,
        pdh_uaddr: int = ...,
        pdh_len: int = ...,
        pad0: int = ...,
        session_uaddr: int = ...,
        session_len: int = ...,
        pad1: int = ...,
    ) -> None: ...

class kvm_sev_receive_update_data(Struct):
    hdr_uaddr: int
    hdr_len: int
    pad0: int
    guest_uaddr: int
    guest_len: int
    pad1: int
    trans_uaddr: int
    trans_len: int
    pad2: int
    def __init__(
        self,
        *,
        hdr_uaddr: int = ...,
        hdr_len: int = ...,
        pad0: int = ...,
        guest_uaddr: int = ...,
        guest_len: int = ...,
        pad1: int = ...,
        trans_uaddr: int = ...,
        trans_len: int = ...,
        pad2: int = ...,
    ) -> None: ...

class kvm_sev_send_start(Struct):
    policy: int
    pad0: int
    pdh_cert_uaddr: int
    pdh_cert_len: int
    pad1: int
    plat_certs_uaddr: int
    plat_certs_len: int
    pad2: int
    amd_certs_uaddr: int
    amd_certs_len: int
    pad3: int
    session_uaddr: int
    session_len: int
    pad4: int
    def __init__(
        self,
        *,
        policy: int = ...,
        pad0: int = ...,
        pdh_cert_uaddr: int = ...,
        pdh_cert_len: int = ...,
        pad1: int = ...,
        plat_certs_uaddr: int = ...,
        plat_certs_len: int = ...,
        pad2: int = ...,
        amd_certs_uaddr: int = ...,
        amd_certs_len: int = ...,
        pad3: int = ...,
        session_uaddr: int = ...,
        session_len: int = ...,
        pad4: int = ...,
    ) -> None: ...

class kvm_sev_send_update_data(Struct):
    hdr_uaddr: int
    hdr_len: int
    pad0: int
    guest_uaddr: int
    guest_len: int
    pad1: int
    trans_uaddr: int
    trans_len: int
    pad2: int
    def __init__(
        self,
        *,
        hdr_uaddr: int = ...,
        hdr_len: int = ...,
        pad0: int = ...,
        guest_uaddr: int = ...,
        guest_len: int = ...,
        pad1: int = ...,
        trans_uaddr: int = ...,
        trans_len: int = ...,
        pad2: int = ...,
    ) -> None: ...

class kvm_sev_snp_launch_finish(Struct):
    id_block_uaddr: int
    id_auth_uaddr: int
    id_block_en: int
    auth_key_en: int
    vcek_disabled: int
    host_data: _Bytes
    pad0: _Bytes
    flags: int
    pad1: _Ints
    def __init__(
        self,
        *,
        id_block_uaddr: int = ...,
        id_auth_uaddr: int = ...,
        id_block_en: int = ...,
        auth_key_en: int = ...,
        vcek_disabled: int = ...,
        host_data: Iterable[int] = ...,
        pad0: Iterable[int] = ...,
        flags: int = ...,
        pad1: Iterable[int] = ...,
    ) -> None: ...

class kvm_sev_snp_launch_start(Struct):
    policy: int
    gosvw: _Bytes
    flags: int
    pad0: _Bytes
    pad1: _Ints
    def __init__(
        self,
        *,
        policy: int = ...,
        gosvw: Iterable[int] = ...,
        flags: int = ...,
        pad0: Iterable[int] = ...,
        pad1: Iterable[int] = ...,
    ) -> None: ...

class kvm_sev_snp_launch_update(Struct):
    gfn_start: int
    uaddr: int
    len: int
    type: int
    pad0: int
    flags: int
    pad1: int
    pad2: _Ints
    def __init__(
        self,
        *,
        gfn_start: int = ...,
        uaddr: int = ...,
        len: int = ...,
        type: int = ...,
        pad0: int = ...,
        flags: int = ...,
        pad1: int = ...,
        pad2: Iterable[int] = ...,
    ) -> None: ...

class kvm_signal_mask(FlexStruct):
    len: int
    sigset: _Bytes
    def __init__(
        self,
        *,
        len: int = ...,
        sigset: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class kvm_sregs(Struct):
    cs: _Nested[kvm_segment]
    ds: _Nested[kvm_segment]
    es: _Nested[kvm_segment]
    fs: _Nested[kvm_segment]
    gs: _Nested[kvm_segment]
    ss: _Nested[kvm_segment]
    tr: _Nested[kvm_segment]
    ldt: _Nested[kvm_segment]
    gdt: _Nested[kvm_dtable]
    idt: _Nested[kvm_dtable]
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: _Ints
    def __init__(
        self,
        *,
        cs: kvm_segment | Mapping[str, object] = ...,
        ds: kvm_segment | Mapping[str, object] = ...,
        es: kvm_segment | Mapping[str, object] = ...,
        fs: kvm_segment | Mapping[str, object] = ...,
        gs: kvm_segment | Mapping[str, object] = ...,
        ss: kvm_segment | Mapping[str, object] = ...,
        tr: kvm_segment | Mapping[str, object] = ...,
        ldt: kvm_segment | Mapping[str, object] = ...,
        gdt: kvm_dtable | Mapping[str, object] = ...,
        idt: kvm_dtable | Mapping[str, object] = ...,
        cr0: int = ...,
        cr2: int = ...,
        cr3: int = ...,
        cr4: int = ...,
        cr8: int = ...,
        efer: int = ...,
        apic_base: int = ...,
        interrupt_bitmap: Iterable[int] = ...,
    ) -> None: ...

class kvm_sregs2(Struct):
    cs: _Nested[kvm_segment]
    ds: _Nested[kvm_segment]
    es: _Nested[kvm_segment]
    fs: _Nested[kvm_segment]
    gs: _Nested[kvm_segment]
    ss: _Nested[kvm_segment]
    tr: _Nested[kvm_segment]
    ldt: _Nested[kvm_segment]
    gdt: _Nested[kvm_dtable]
    idt: _Nested[kvm_dtable]
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    flags: int
    pdptrs: _Ints
    def __init__(
        self,
        *,
        cs: kvm_segment | Mapping[str, object] = ...,
        ds: kvm_segment | Mapping[str, object] = ...,
        es: kvm_segment | Mapping[str, object] = ...,
        fs: kvm_segment | Mapping[str, object] = ...,
        gs: kvm_segment | Mapping[str, object] = ...,
        ss: kvm_segment | Mapping[str, object] = ...,
        tr: kvm_segment | Mapping[str, object] = ...,
        ldt: kvm_segment | Mapping[str, object] = ...,
        gdt: kvm_dtable | Mapping[str, object] = ...,
        idt: kvm_dtable | Mapping[str, object] = ...,
        cr0: int = ...,
        cr2: int = ...,
        cr3: int = ...,
        cr4: int = ...,
        cr8: int = ...,
        efer: int = ...,
        apic_base: int = ...,
        flags: int = ...,
        pdptrs: Iterable[int] = ...,
    ) -> None: ...

class kvm_stats_desc(FlexStruct):
    flags: int
    exponent: int
    size: int
    offset: int
    bucket_size: int
    name: _Bytes
    def __init__(
        self,
        *,
        flags: int = ...,
        exponent: int = ...,
        size: int = ...,
        offset: int = ...,
        bucket_size: int = ...,
        name: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class kvm_stats_header(Struct):
    flags: int
    name_size: int
    num_desc: int
    id_offset: int
    desc_offset: int
    data_offset: int
    def __init__(
        self,
        *,
        flags: int = ...,
        name_size: int = ...,
        num_desc: int = ...,
        id_offset: int = ...,
        desc_offset: int = ...,
        data_offset: int = ...,
    ) -> None: ...

class kvm_steal_time(Struct):
    steal: int
    version: int
    flags: int
    preempted: int
    u8_pad: _Bytes
    pad: _Ints
    def __init__(
        self,
        *,
        steal: int = ...,
        version: int = ...,
        flags: int = ...,
        preempted: int = ...,
        u8_pad: Iterable[int] = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_svm_nested_state_data(Struct):
    vmcb12: _Bytes
    def __init__(
        self,
        *,
        vmcb12: Iterable[int] = ...,
    ) -> None: ...

class kvm_svm_nested_state_hdr(Struct):
    vmcb_pa: int
    gpat: int
    def __init__(
        self,
        *,
        vmcb_pa: int = ...,
        gpat: int = ...,
    ) -> None: ...

class kvm_sync_regs(Struct):
    regs: _Nested[kvm_regs]
    sregs: _Nested[kvm_sregs]
    events: _Nested[kvm_vcpu_events]
    def __init__(
        self,
        *,
        regs: kvm_regs | Mapping[str, object] = ...,
        sregs: kvm_sregs | Mapping[str, object] = ...,
        events: kvm_vcpu_events | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_tdx_capabilities(FlexStruct):
    supported_attrs: int
    supported_xfam: int
    kernel_tdvmcallinfo_1_r11: int
    user_tdvmcallinfo_1_r11: int
    kernel_tdvmcallinfo_1_r12: int
    user_tdvmcallinfo_1_r12: int
    reserved: _Ints
    cpuid: _Nested[kvm_cpuid2]
    def __init__(
        self,
        *,
        supported_attrs: int = ...,
        supported_xfam: int = ...,
        kernel_tdvmcallinfo_1_r11: int = ...,
        user_tdvmcallinfo_1_r11: int = ...,
        kernel_tdvmcallinfo_1_r12: int = ...,
        user_tdvmcallinfo_1_r12: int = ...,
        reserved: Iterable[int] = ...,
        cpuid: kvm_cpuid2 | Mapping[str, object] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_cpuid_entry2]: ...

class kvm_tdx_cmd(Struct):
    id: int
    flags: int
    data: int
    hw_error: int
    def __init__(
        self,
        *,
        id: int = ...,
        flags: int = ...,
        data: int = ...,
        hw_error: int = ...,
    ) -> None: ...

class kvm_tdx_init_mem_region(Struct):
    source_addr: int
    gpa: int
    nr_pages: int
    def __init__(
        self,
        *,
        source_addr: int = ...,
        gpa: int = ...,
        nr_pages: int = ...,
    ) -> None: ...

class kvm_tdx_init_vm(FlexStruct):
    attributes: int
    xfam: int
    mrconfigid: _Ints
    mrowner: _Ints
    mrownerconfig: _Ints
    reserved: _Ints
    cpuid: _Nested[kvm_cpuid2]
    def __init__(
        self,
        *,
        attributes: int = ...,
        xfam: int = ...,
        mrconfigid: Iterable[int] = ...,
        mrowner: Iterable[int] = ...,
        mrownerconfig: Iterable[int] = ...,
        reserved: Iterable[int] = ...,
        cpuid: kvm_cpuid2 | Mapping[str, object] = ...,
    ) -> None: ...
    def entries_list(self) -> list[kvm_cpuid_entry2]: ...

class kvm_tpr_access_ctl(Struct):
    enabled: int
    flags: int
    reserved: _Ints
    def __init__(
        self,
        *,
        enabled: int = ...,
        flags: int = ...,
        reserved: Iterable[int] = ...,
    ) -> None: ...

class kvm_translation(Struct):
    linear_address: int
    physical_address: int
    valid: int
    writeable: int
    usermode: int
    pad: _Bytes
    def __init__(
        self,
        *,
        linear_address: int = ...,
        physical_address: int = ...,
        valid: int = ...,
        writeable: int = ...,
        usermode: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_userspace_memory_region(Struct):
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    def __init__(
        self,
        *,
        slot: int = ...,
        flags: int = ...,
        guest_phys_addr: int = ...,
        memory_size: int = ...,
        userspace_addr: int = ...,
    ) -> None: ...

class kvm_userspace_memory_region2(Struct):
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    guest_memfd_offset: int
    guest_memfd: int
    pad1: int
    pad2: _Ints
    def __init__(
        self,
        *,
        slot: int = ...,
        flags: int = ...,
        guest_phys_addr: int = ...,
        memory_size: int = ...,
        userspace_addr: int = ...,
        guest_memfd_offset: int = ...,
        guest_memfd: int = ...,
        pad1: int = ...,
        pad2: Iterable[int] = ...,
    ) -> None: ...

class kvm_vapic_addr(Struct):
    vapic_addr: int
    def __init__(
        self,
        *,
        vapic_addr: int = ...,
    ) -> None: ...

class kvm_vcpu_events(Struct):
    exception: _Nested[kvm_vcpu_events__exception]
    interrupt: _Nested[kvm_vcpu_events__interrupt]
    nmi: _Nested[kvm_vcpu_events__nmi]
    sipi_vector: int
    flags: int
    smi: _Nested[kvm_vcpu_events__smi]
    triple_fault: _Nested[kvm_vcpu_events__triple_fault]
    reserved: _Bytes
    exception_has_payload: int
    exception_payload: int
    def __init__(
        self,
        *,
        exception: kvm_vcpu_events__exception | Mapping[str, object] = ...,
        interrupt: kvm_vcpu_events__interrupt | Mapping[str, object] = ...,
        nmi: kvm_vcpu_events__nmi | Mapping[str, object] = ...,
        sipi_vector: int = ...,
        flags: int = ...,
        smi: kvm_vcpu_events__smi | Mapping[str, object] = ...,
        triple_fault: kvm_vcpu_events__triple_fault | Mapping[str, object] = ...,
        reserved: Iterable[int] = ...,
        exception_has_payload: int = ...,
        exception_payload: int = ...,
    ) -> None: ...

class kvm_vcpu_events__exception(Struct):
    injected: int
    nr: int
    has_error_code: int
    pending: int
    error_code: int
    def __init__(
        self,
        *,
        injected: int = ...,
        nr: int = ...,
        has_error_code: int = ...,
        pending: int = ...,
        error_code: int = ...,
    ) -> None: ...

class kvm_vcpu_events__interrupt(Struct):
    injected: int
    nr: int
    soft: int
    shadow: int
    def __init__(
        self,
        *,
        injected: int = ...,
        nr: int = ...,
        soft: int = ...,
        shadow: int = ...,
    ) -> None: ...

class kvm_vcpu_events__nmi(Struct):
    injected: int
    pending: int
    masked: int
    pad: int
    def __init__(
        self,
        *,
        injected: int = ...,
        pending: int = ...,
        masked: int = ...,
        pad: int = ...,
    ) -> None: ...

class kvm_vcpu_events__smi(Struct):
    smm: int
    pending: int
    smm_inside_nmi: int
    latched_init: int
    def __init__(
        self,
        *,
        smm: int = ...,
        pending: int = ...,
        smm_inside_nmi: int = ...,
        latched_init: int = ...,
    ) -> None: ...

class kvm_vcpu_events__triple_fault(Struct):
    pending: int
    def __init__(
        self,
        *,
        pending: int = ...,
    ) -> None: ...

class kvm_vcpu_pv_apf_data(Struct):
    flags: int
    token: int
    pad: _Bytes
    def __init__(
        self,
        *,
        flags: int = ...,
        token: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_vmx_nested_state_data(Struct):
    vmcs12: _Bytes
    shadow_vmcs12: _Bytes
    def __init__(
        self,
        *,
        vmcs12: Iterable[int] = ...,
        shadow_vmcs12: Iterable[int] = ...,
    ) -> None: ...

class kvm_vmx_nested_state_hdr(Struct):
    vmxon_pa: int
    vmcs12_pa: int
    smm: _Nested[kvm_vmx_nested_state_hdr__smm]
    pad: int
    flags: int
    preemption_timer_deadline: int
    def __init__(
        self,
        *,
        vmxon_pa: int = ...,
        vmcs12_pa: int = ...,
        smm: kvm_vmx_nested_state_hdr__smm | Mapping[str, object] = ...,
        pad: int = ...,
        flags: int = ...,
        preemption_timer_deadline: int = ...,
    ) -> None: ...

class kvm_vmx_nested_state_hdr__smm(Struct):
    flags: int
    def __init__(
        self,
        *,
        flags: int = ...,
    ) -> None: ...

class kvm_x86_mce(Struct):
    status: int
    addr: int
    misc: int
    mcg_status: int
    bank: int
    pad1: _Bytes
    pad2: _Ints
    def __init__(
        self,
        *,
        status: int = ...,
        addr: int = ...,
        misc: int = ...,
        mcg_status: int = ...,
        bank: int = ...,
        pad1: Iterable[int] = ...,
        pad2: Iterable[int] = ...,
    ) -> None: ...

class kvm_xcr(Struct):
    xcr: int
    reserved: int
    value: int
    def __init__(
        self,
        *,
        xcr: int = ...,
        reserved: int = ...,
        value: int = ...,
    ) -> None: ...

class kvm_xcrs(Struct):
    nr_xcrs: int
    flags: int
    xcrs: _Structs[kvm_xcr]
    padding: _Ints
    def __init__(
        self,
        *,
        nr_xcrs: int = ...,
        flags: int = ...,
        xcrs: Iterable[kvm_xcr | Mapping[str, object]] = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_xen_exit(Struct):
    type: int
    u: _Nested[kvm_xen_exit__u]
    def __init__(
        self,
        *,
        type: int = ...,
        u: kvm_xen_exit__u | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_xen_exit__u(Struct):
    hcall: _Nested[kvm_xen_exit__u__hcall]
    def __init__(
        self,
        *,
        hcall: kvm_xen_exit__u__hcall | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_xen_exit__u__hcall(Struct):
    longmode: int
    cpl: int
    input: int
    result: int
    params: _Ints
    def __init__(
        self,
        *,
        longmode: int = ...,
        cpl: int = ...,
        input: int = ...,
        result: int = ...,
        params: Iterable[int] = ...,
    ) -> None: ...

class kvm_xen_hvm_attr(Struct):
    type: int
    pad: _Ints
    u: _Nested[kvm_xen_hvm_attr__u]
    def __init__(
        self,
        *,
        type: int = ...,
        pad: Iterable[int] = ...,
        u: kvm_xen_hvm_attr__u | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_xen_hvm_attr__u(Struct):
    long_mode: int
    vector: int
    runstate_update_flag: int
    shared_info: _Nested[kvm_xen_hvm_attr__u__shared_info]
    evtchn: _Nested[kvm_xen_hvm_attr__u__evtchn]
    xen_version: int
    pad: _Ints
    def __init__(
        self,
        *,
        long_mode: int = ...,
        vector: int = ...,
        runstate_update_flag: int = ...,
        shared_info: kvm_xen_hvm_attr__u__shared_info | Mapping[str, object] = ...,
        evtchn: kvm_xen_hvm_attr__u__evtchn | Mapping[str, object] = ...,
        xen_version: int = ...,
        pad: Iterable[int] = ...,
    ) -> None: ...

class kvm_xen_hvm_attr__u__evtchn(Struct):
    send_port: int
    type: int
    flags: int
    deliver: _Nested[kvm_xen_hvm_attr__u__evtchn__deliver]
    def __init__(
        self,
        *,
        send_port: int = ...,
        type: int = ...,
        flags: int = ...,
        deliver: kvm_xen_hvm_attr__u__evtchn__deliver | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_xen_hvm_attr__u__evtchn__deliver(Struct):
    port: _Nested[kvm_xen_hvm_attr__u__evtchn__deliver__port]
    eventfd: _Nested[kvm_xen_hvm_attr__u__evtchn__deliver__eventfd]
    padding: _Ints
    def __init__(
        self,
        *,
        port: kvm_xen_hvm_attr__u__evtchn__deliver__port | Mapping[str, object] = ...,
        eventfd: kvm_xen_hvm_attr__u__evtchn__deliver__eventfd | Mapping[str, object] = ...,
        padding: Iterable[int] = ...,
    ) -> None: ...

class kvm_xen_hvm_attr__u__evtchn__deliver__eventfd(Struct):
    port: int
    fd: int
    def __init__(
        self,
        *,
        port: int = ...,
        fd: int = ...,
    ) -> None: ...

class kvm_xen_hvm_attr__u__evtchn__deliver__port(Struct):
    port: int
    vcpu: int
    priority: int
    def __init__(
        self,
        *,
        port: int = ...,
        vcpu: int = ...,
        priority: int = ...,
    ) -> None: ...

class kvm_xen_hvm_attr__u__shared_info(Struct):
    gfn: int
    hva: int
    def __init__(
        self,
        *,
        gfn: int = ...,
        hva: int = ...,
    ) -> None: ...

class kvm_xen_hvm_config(Struct):
    flags: int
    msr: int
    blob_addr_32: int
    blob_addr_64: int
    blob_size_32: int
    blob_size_64: int
    pad2: _Bytes
    def __init__(
        self,
        *,
        flags: int = ...,
        msr: int = ...,
        blob_addr_32: int = ...,
        blob_addr_64: int = ...,
        blob_size_32: int = ...,
        blob_size_64: int = ...,
        pad2: Iterable[int] = ...,
    ) -> None: ...

class kvm_xen_vcpu_attr(Struct):
    type: int
    pad: _Ints
    u: _Nested[kvm_xen_vcpu_attr__u]
    def __init__(
        self,
        *,
        type: int = ...,
        pad: Iterable[int] = ...,
        u: kvm_xen_vcpu_attr__u | Mapping[str, object] = ...,
    ) -> None: ...

class kvm_xen_vcpu_attr__u(Struct):
    gpa: int
    hva: int
    pad: _Ints
    runstate: _Nested[kvm_xen_vcpu_attr__u__runstate]
    vcpu_id: int
    timer: _Nested[kvm_xen_vcpu_attr__u__timer]
    vector: int
    def __init__(
        self,
        *,
        gpa: int = ...,
        hva: int = ...,
        pad: Iterable[int] = ...,
        runstate: kvm_xen_vcpu_attr__u__runstate | Mapping[str, object] = ...,
        vcpu_id: int = ...,
        timer: kvm_xen_vcpu_attr__u__timer | Mapping[str, object] = ...,
        vector: int = ...,
    ) -> None: ...

class kvm_xen_vcpu_attr__u__runstate(Struct):
    state: int
    state_entry_time: int
    time_running: int
    time_runnable: int
    time_blocked: int
    time_offline: int
    def __init__(
        self,
        *,
        state: int = ...,
        state_entry_time: int = ...,
        time_running: int = ...,
        time_runnable: int = ...,
        time_blocked: int = ...,
        time_offline: int = ...,
    ) -> None: ...

class kvm_xen_vcpu_attr__u__timer(Struct):
    port: int
    priority: int
    expires_ns: int
    def __init__(
        self,
        *,
        port: int = ...,
        priority: int = ...,
        expires_ns: int = ...,
    ) -> None: ...

class kvm_xsave(FlexStruct):
    region: _Ints
    extra: _Ints
    def __init__(
        self,
        *,
        region: Iterable[int] = ...,
        extra: Iterable[int] = ...,
    ) -> None: ...
    def entries_list(self) -> list[int]: ...

class sev_issue_cmd(Struct):
    cmd: int
    data: int
    error: int
    def __init__(
        self,
        *,
        cmd: int = ...,
        data: int = ...,
        error: int = ...,
    ) -> None: ...

class sev_user_data_get_id(Struct):
    socket1: _Bytes
    socket2: _Bytes
    def __init__(
        self,
        *,
        socket1: Iterable[int] = ...,
        socket2: Iterable[int] = ...,
    ) -> None: ...

class sev_user_data_get_id2(Struct):
    address: int
    length: int
    def __init__(
        self,
        *,
        address: int = ...,
        length: int = ...,
    ) -> None: ...

class sev_user_data_pdh_cert_export(Struct):
    pdh_cert_address: int
    pdh_cert_len: int
    cert_chain_address: int
    cert_chain_len: int
    def __init__(
        self,
        *,
        pdh_cert_address: int = ...,
        pdh_cert_len: int = ...,
        cert_chain_address: int = ...,
        cert_chain_len: int = ...,
    ) -> None: ...

class sev_user_data_pek_cert_import(Struct):
    pek_cert_address: int
    pek_cert_len: int
    oca_cert_address: int
    oca_cert_len: int
    def __init__(
        self,
        *,
        pek_cert_address: int = ...,
        pek_cert_len: int = ...,
        oca_cert_address: int = ...,
        oca_cert_len: int = ...,
    ) -> None: ...

class sev_user_data_pek_csr(Struct):
    address: int
    length: int
    def __init__(
        self,
        *,
        address: int = ...,
        length: int = ...,
    ) -> None: ...

class sev_user_data_snp_config(Struct):
    reported_tcb: int
    mask_chip_id: int
    mask_chip_key: int
    rsvd: int
    rsvd1: _Bytes
    def __init__(
        self,
        *,
        reported_tcb: int = ...,
        mask_chip_id: int = ...,
        mask_chip_key: int = ...,
        rsvd: int = ...,
        rsvd1: Iterable[int] = ...,
    ) -> None: ...

class sev_user_data_snp_status(Struct):
    api_major: int
    api_minor: int
    state: int
    is_rmp_initialized: int
    rsvd: int
    build_id: int
    mask_chip_id: int
    mask_chip_key: int
    vlek_en: int
    feature_info: int
    rapl_dis: int
    ciphertext_hiding_cap: int
    ciphertext_hiding_en: int
    rsvd1: int
    guest_count: int
    current_tcb_version: int
    reported_tcb_version: int
    def __init__(
        self,
        *,
        api_major: int = ...,
        api_minor: int = ...,
        state: int = ...,
        is_rmp_initialized: int = ...,
        rsvd: int = ...,
        build_id: int = ...,
        mask_chip_id: int = ...,
        mask_chip_key: int = ...,
        vlek_en: int = ...,
        feature_info: int = ...,
        rapl_dis: int = ...,
        ciphertext_hiding_cap: int = ...,
        ciphertext_hiding_en: int = ...,
        rsvd1: int = ...,
        guest_count: int = ...,
        current_tcb_version: int = ...,
        reported_tcb_version: int = ...,
    ) -> None: ...

class sev_user_data_snp_vlek_load(Struct):
    len: int
    vlek_wrapped_version: int
    rsvd: _Bytes
    vlek_wrapped_address: int
    def __init__(
        self,
        *,
        len: int = ...,
        vlek_wrapped_version: int = ...,
        rsvd: Iterable[int] = ...,
        vlek_wrapped_address: int = ...,
    ) -> None: ...

class sev_user_data_snp_wrapped_vlek_hashstick(Struct):
    data: _Bytes
    def __init__(
        self,
        *,
        data: Iterable[int] = ...,
    ) -> None: ...

class sev_user_data_status(Struct):
    api_major: int
    api_minor: int
    state: int
    flags: int
    build: int
    guest_count: int
    def __init__(
        self,
        *,
        api_major: int = ...,
        api_minor: int = ...,
        state: int = ...,
        flags: int = ...,
        build: int = ...,
        guest_count: int = ...,
    ) -> None: ...

class uffd_msg(Struct):
    event: int
    reserved1: int
    reserved2: int
    reserved3: int
    arg: _Nested[uffd_msg__arg]
    def __init__(
        self,
        *,
        event: int = ...,
        reserved1: int = ...,
        reserved2: int = ...,
        reserved3: int = ...,
        arg: uffd_msg__arg | Mapping[str, object] = ...,
    ) -> None: ...

class uffd_msg__arg(Struct):
    pagefault: _Nested[uffd_msg__arg__pagefault]
    fork: _Nested[uffd_msg__arg__fork]
    remap: _Nested[uffd_msg__arg__remap]
    remove: _Nested[uffd_msg__arg__remove]
    reserved: _Nested[uffd_msg__arg__reserved]
    def __init__(
        self,
        *,
        pagefault: uffd_msg__arg__pagefault | Mapping[str, object] = ...,
        fork: uffd_msg__arg__fork | Mapping[str, object] = ...,
        remap: uffd_msg__arg__remap | Mapping[str, object] = ...,
        remove: uffd_msg__arg__remove | Mapping[str, object] = ...,
        reserved: uffd_msg__arg__reserved | Mapping[str, object] = ...,
    ) -> None: ...

class uffd_msg__arg__fork(Struct):
    ufd: int
    def __init__(
        self,
        *,
        ufd: int = ...,
    ) -> None: ...

class uffd_msg__arg__pagefault(Struct):
    flags: int
    address: int
    feat: _Nested[uffd_msg__arg__pagefault__feat]
    def __init__(
        self,
        *,
        flags: int = ...,
        address: int = ...,
        feat: uffd_msg__arg__pagefault__feat | Mapping[str, object] = ...,
    ) -> None: ...

class uffd_msg__arg__pagefault__feat(Struct):
    ptid: int
    def __init__(
        self,
        *,
        ptid: int = ...,
    ) -> None: ...

class uffd_msg__arg__remap(Struct):
    from_: int
    to: int
    len: int
    def __init__(
        self,
        *,
        from_: int = ...,
        to: int = ...,
        len: int = ...,
    ) -> None: ...

class uffd_msg__arg__remove(Struct):
    start: int
    end: int
    def __init__(
        self,
        *,
        start: int = ...,
        end: int = ...,
    ) -> None: ...

class uffd_msg__arg__reserved(Struct):
    reserved1: int
    reserved2: int
    reserved3: int
    def __init__(
        self,
        *,
        reserved1: int = ...,
        reserved2: int = ...,
        reserved3: int = ...,
    ) -> None: ...

class uffdio_api(Struct):
    api: int
    features: int
    ioctls: int
    def __init__(
        self,
        *,
        api: int = ...,
        features: int = ...,
        ioctls: int = ...,
    ) -> None: ...

class uffdio_continue(Struct):
    range: _Nested[uffdio_range]
    mode: int
    mapped: int
    def __init__(
        self,
        *,
        range: uffdio_range | Mapping[str, object] = ...,
        mode: int = ...,
        mapped: int = ...,
    ) -> None: ...

class uffdio_copy(Struct):
    dst: int
    src: int
    len: int
    mode: int
    copy: int  # type: ignore[assignment]
    def __init__(
        self,
        *,
        dst: int = ...,
        src: int = ...,
        len: int = ...,
        mode: int = ...,
        copy: int = ...,
    ) -> None: ...

class uffdio_move(Struct):
    dst: int
    src: int
    len: int
    mode: int
    move: int
    def __init__(
        self,
        *,
        dst: int = ...,
        src: int = ...,
        len: int = ...,
        mode: int = ...,
        move: int = ...,
    ) -> None: ...

class uffdio_poison(Struct):
    range: _Nested[uffdio_range]
    mode: int
    updated: int
    def __init__(
        self,
        *,
        range: uffdio_range | Mapping[str, object] = ...,
        mode: int = ...,
        updated: int = ...,
    ) -> None: ...

class uffdio_range(Struct):
    start: int
    len: int
    def __init__(
        self,
        *,
        start: int = ...,
        len: int = ...,
    ) -> None: ...

class uffdio_register(Struct):
    range: _Nested[uffdio_range]
    mode: int
    ioctls: int
    def __init__(
        self,
        *,
        range: uffdio_range | Mapping[str, object] = ...,
        mode: int = ...,
        ioctls: int = ...,
    ) -> None: ...

class uffdio_writeprotect(Struct):
    range: _Nested[uffdio_range]
    mode: int
    def __init__(
        self,
        *,
        range: uffdio_range | Mapping[str, object] = ...,
        mode: int = ...,
    ) -> None: ...

class uffdio_zeropage(Struct):
    range: _Nested[uffdio_range]
    mode: int
    zeropage: int
    def __init__(
        self,
        *,
        range: uffdio_range | Mapping[str, object] = ...,
        mode: int = ...,
        zeropage: int = ...,
    ) -> None: ...
