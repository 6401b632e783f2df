# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F403
# isort: skip_file
# The public names of kvmpy, by topic.  kvmpy/__init__.py reads this file, which is the one place that
# declares them.

__version__: str
__all__: list[str]

# Tests
from kvmpy.testing.fixtures import MakeVm as MakeVm
from kvmpy.testing.fixtures import MakeLoad as MakeLoad
from kvmpy.testing.fixtures import LoadedRegion as LoadedRegion
from kvmpy.testing.refusals import refused as refused
from kvmpy.testing.verdicts import Missing as Missing

# Machines
from kvmpy.coco.kvm import Kvm as Kvm
from kvmpy.guest.vm import GuestVm as GuestVm
from kvmpy.guest.vcpu import GuestVcpu as GuestVcpu
from kvmpy.guest.options import VmOptions as VmOptions
from kvmpy.guest.options import SlotOptions as SlotOptions
from kvmpy.guest.program import GuestProgram as GuestProgram
from kvmpy.guest.ucall import Ucall as Ucall
from kvmpy.core.vm import Vm as Vm
from kvmpy.core.vcpu import Vcpu as Vcpu
from kvmpy.core.threads import VcpuThread as VcpuThread
from kvmpy.core.fd import KvmFd as KvmFd
from kvmpy.core.device import Device as Device
from kvmpy.guest.agent import AGENT as AGENT
from kvmpy.guest.agent import Agent as Agent
from kvmpy.guest.agent import AgentFaultError as AgentFaultError
from kvmpy.guest.agent import Fault as Fault
from kvmpy.guest.agent import Registers as Registers
from kvmpy.guest.l2 import L1 as L1
from kvmpy.guest.l2 import L2 as L2
from kvmpy.guest.l2 import VmExit as VmExit
from kvmpy.guest.legacy import Ended as Ended
from kvmpy.guest.legacy import Legacy as Legacy
from kvmpy.guest.legacy import LegacyMode as LegacyMode
from kvmpy.guest.load import LOAD as LOAD
from kvmpy.guest.load import Load as Load
from kvmpy.guest.load import LoadError as LoadError

# Addresses
from kvmpy.core.address import Gva as Gva
from kvmpy.core.address import Gpa as Gpa
from kvmpy.core.address import RawGpa as RawGpa
from kvmpy.core.address import EncryptionBit as EncryptionBit
from kvmpy.core.address import PAGE_SIZE as PAGE_SIZE
from kvmpy.core.address import SIZE_2M as SIZE_2M
from kvmpy.core.address import SIZE_1G as SIZE_1G

# Memory
from kvmpy.core.backing import Backing as Backing
from kvmpy.core.backing import Anonymous as Anonymous
from kvmpy.core.backing import MemFd as MemFd
from kvmpy.core.backing import HugeTlb as HugeTlb
from kvmpy.core.backing import Mapping as Mapping
from kvmpy.core.slots import MemorySlot as MemorySlot
from kvmpy.core.gmem import GuestMemfd as GuestMemfd
from kvmpy.core.dirty import DirtyBitmap as DirtyBitmap
from kvmpy.core.dirty import DirtyRing as DirtyRing
from kvmpy.core.dirty import DirtyGfn as DirtyGfn
from kvmpy.core.uffd import DemandPager as DemandPager
from kvmpy.core.uffd import PageFault as PageFault
from kvmpy.core.uffd import Userfaultfd as Userfaultfd
from kvmpy.core.coalesced import CoalescedRing as CoalescedRing
from kvmpy.core.coalesced import CoalescedWrite as CoalescedWrite
from kvmpy.x86.paging import PageTables as PageTables

# Exits
from kvmpy.core.exits import Exit as Exit
from kvmpy.core.exits import IoExit as IoExit
from kvmpy.core.exits import MmioExit as MmioExit
from kvmpy.core.exits import HltExit as HltExit
from kvmpy.core.exits import HypercallExit as HypercallExit
from kvmpy.core.exits import HypervHypercallExit as HypervHypercallExit
from kvmpy.core.exits import HypervSynicExit as HypervSynicExit
from kvmpy.core.exits import HypervSyndbgExit as HypervSyndbgExit
from kvmpy.core.exits import XenHypercallExit as XenHypercallExit
from kvmpy.core.exits import DebugExit as DebugExit
from kvmpy.core.exits import ShutdownExit as ShutdownExit
from kvmpy.core.exits import SystemEventExit as SystemEventExit
from kvmpy.core.exits import InternalErrorExit as InternalErrorExit
from kvmpy.core.exits import FailEntryExit as FailEntryExit
from kvmpy.core.exits import MemoryFaultExit as MemoryFaultExit
from kvmpy.core.exits import DirtyRingFullExit as DirtyRingFullExit
from kvmpy.core.exits import IoapicEoiExit as IoapicEoiExit
from kvmpy.core.exits import IrqWindowOpenExit as IrqWindowOpenExit
from kvmpy.core.exits import SetTprExit as SetTprExit
from kvmpy.core.exits import MsrExit as MsrExit
from kvmpy.core.exits import RdmsrExit as RdmsrExit
from kvmpy.core.exits import WrmsrExit as WrmsrExit
from kvmpy.core.exits import ApResetHoldExit as ApResetHoldExit
from kvmpy.core.exits import SnpReqCertsExit as SnpReqCertsExit

# Errors
from kvmpy.core.errors import KvmError as KvmError
from kvmpy.core.errors import MissingError as MissingError
from kvmpy.core.errors import PrivateMemoryError as PrivateMemoryError
from kvmpy.core.errors import VcpuBusyError as VcpuBusyError
from kvmpy.core.vcpu import VcpuKickedError as VcpuKickedError
from kvmpy.core.vcpu_save import RestoreError as RestoreError
from kvmpy.core.sev_errors import SevError as SevError
from kvmpy.guest.errors import GuestError as GuestError
from kvmpy.guest.errors import GuestAssertionError as GuestAssertionError
from kvmpy.guest.errors import GuestExceptionError as GuestExceptionError
from kvmpy.guest.errors import GuestSymbolError as GuestSymbolError
from kvmpy.guest.errors import GuestTimeoutError as GuestTimeoutError
from kvmpy.guest.errors import LaunchError as LaunchError
from kvmpy.guest.errors import UnexpectedExitError as UnexpectedExitError

# Interrupts and events
from kvmpy.core.eventfd import EventFd as EventFd
from kvmpy.core.irq import HvSintRoute as HvSintRoute
from kvmpy.core.irq import IrqchipRoute as IrqchipRoute
from kvmpy.core.irq import Msi as Msi
from kvmpy.core.irq import MsiRoute as MsiRoute
from kvmpy.core.irq import RedirectionEntry as RedirectionEntry
from kvmpy.core.irq import XenEvtchnRoute as XenEvtchnRoute
from kvmpy.core.irq import default_routes as default_routes
from kvmpy.core.vcpu_state import DebugPoint as DebugPoint
from kvmpy.core.vcpu_save import VcpuSnapshot as VcpuSnapshot
from kvmpy.core.stats import Stats as Stats
from kvmpy.core.stats import StatsFd as StatsFd

# The processor
from kvmpy.x86.bits import CR0 as CR0
from kvmpy.x86.bits import CR4 as CR4
from kvmpy.x86.bits import EFER as EFER
from kvmpy.x86.bits import RFLAGS as RFLAGS
from kvmpy.x86.bits import XCR0 as XCR0
from kvmpy.x86.cpuid import Cpuid as Cpuid
from kvmpy.x86.cpuid import CpuidEntry as CpuidEntry
from kvmpy.x86.exceptions import Vector as Vector
from kvmpy.x86.msr_numbers import Msr as Msr
from kvmpy.x86.pferr import PfErr as PfErr
from kvmpy.x86.nested_state import SvmNestedState as SvmNestedState
from kvmpy.x86.svm_exits import SvmExit as SvmExit
from kvmpy.x86.vmcb import Event as Event
from kvmpy.x86.vmcb import EventType as EventType
from kvmpy.x86.vmcb import Vmcb as Vmcb
from kvmpy.x86.xsave import XsaveArea as XsaveArea
from kvmpy.core.msr_filter import MsrFilter as MsrFilter
from kvmpy.core.msr_filter import MsrRange as MsrRange
from kvmpy.core.msrs import MsrError as MsrError
from kvmpy.x86 import apic as apic
from kvmpy.x86 import segments as segments

# What a VM did
from kvmpy.coco.recording import record as record
from kvmpy.debug.decode.timeline import timeline as timeline

# Encrypted VMs
from kvmpy.coco.policy import SevPolicy as SevPolicy
from kvmpy.coco.policy import SnpPolicy as SnpPolicy
from kvmpy.coco.sev import Sev as Sev
from kvmpy.coco.sev import SevEs as SevEs
from kvmpy.coco.snp import Snp as Snp
from kvmpy.coco.sev_session import GuestOwner as GuestOwner
from kvmpy.coco.report import Report as Report
from kvmpy.coco.guest_message import Message as Message
from kvmpy.coco.guest_message import MessageType as MessageType
from kvmpy.coco.idblock import IdBlock as IdBlock
from kvmpy.core.sev_device import SevDevice as SevDevice
from kvmpy.x86.ghcb import GHCB as GHCB

# The kernel's words: every ioctl, constant and struct of KVM under its own name
from kvmpy.uapi import ioctls as ioctls
from kvmpy.uapi.ioctls import Ioctl as Ioctl
from kvmpy.uapi.constants import *
from kvmpy.uapi.structs import *
